// Scratch memory, and who does what: each thread has its own part of the images and of the memory.
#pragma once

#include "part.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
constexpr int FENCE = 16; // floats behind each part of the scratch memory that nobody may touch
#else
#define ASAN_POISON_MEMORY_REGION(at, size)
#define ASAN_UNPOISON_MEMORY_REGION(at, size)
constexpr int FENCE = 0;
#endif

namespace {

constexpr size_t padded(size_t floats) { return (floats + 15) / 16 * 16 + FENCE; }

// Scratch memory that is handed out in parts.
struct Scratch {
    float *next = nullptr;

    float *take(size_t floats) {
        float *part = next;
        next += padded(floats);
        ASAN_POISON_MEMORY_REGION(next - FENCE, 4 * FENCE);
        return part;
    }
    float *zeros(size_t floats) {
        float *part = take(floats);
        if (floats) memset(part, 0, 4 * floats);
        return part;
    }
};

// That of a calling thread: it grows, and stays for the next call.
struct Arena : Scratch {
    float *start = nullptr;
    size_t size = 0;

    bool reserve(size_t floats) {
        floats += 32 * FENCE;
        ASAN_UNPOISON_MEMORY_REGION(start, 4 * size);
        if (floats > size) {
            free(start);
            size = (floats + 1023) / 1024 * 1024;
            start = static_cast<float *>(aligned_alloc(64, 4 * size));
            if (!start) size = 0;
        }
        next = start;
        return start != nullptr;
    }
    ~Arena() {
        ASAN_UNPOISON_MEMORY_REGION(start, 4 * size);
        free(start);
    }
};

thread_local Arena arena;

// The images from first to last of the thread that asks.
struct Share {
    int first, last;
    explicit Share(int64_t count) {
        const int64_t one = omp_get_thread_num(), all = omp_get_num_threads();
        first = one * count / all, last = (one + 1) * count / all;
    }
};

} // namespace
