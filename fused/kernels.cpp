// Parts of the operations of a cell as fused kernels for the CPU: see operation.py for what and why.
//
// Images are (H, W, channels), float32. A part is one of five ways from its input x to p,
//   CONV   (ReLU,) depthwise k x k with stride and dilation -> d, or d = x without depthwise weights; pointwise -> p
//   HALVES ReLU, x at the even and x at the odd pixels -> d, pointwise from each to a half of p's channels
//   MAX    max pooling k x k with a stride
//   MEAN   average pooling k x k with a stride, the padding not counted
//   NOTHING
// then batch norm with all that may scale it, y = keep scale (gamma (p - mean) / std + beta), and out = y or out += y.
//
// Each image is worked on by one core. Inside it lies as (groups, pixels, V): V floats are a register of the processor,
// or fewer where there are few channels; the last group is padded with zeros. A convolution goes through it in bands of
// rows, from x to p and back, so that all but p stays in the innermost cache. Batch norm needs the whole batch twice:
// the second time the images come in reverse, while the last ones are still in a cache. Sums over the batch are taken
// per image or per chunk of images and added in a fixed order, so that no result depends on the number of threads.
//
// part.h      what is asked for; the processor         taps.h       depthwise convolutions
// memory.h    scratch memory, the threads' shares      pointwise.h  products with the pointwise weights
// vectors.h   V floats at a time                       pooling.h    max and average
// shape.h     sizes, and the way through an image      norm.h       batch norm, scale, drop path, the sum
// groups.h    images to groups of channels and back    project.h    x to p; then forward.h and backward.h, all of it

#include "part.h"
#include "memory.h"

namespace {

namespace width4 {
constexpr int V = 4;
#include "passes.h"
}
#if defined(__AVX__)
namespace width8 {
constexpr int V = 8;
#include "passes.h"
}
#endif
#if defined(__AVX512F__)
namespace width16 {
constexpr int V = 16;
#include "passes.h"
}
#endif

struct Width {
    int (*forward)(const Part &), (*backward)(const Part &);
    int64_t (*kept_floats)(const Part &);
};

Width width_for(const Part &part) {
    const int64_t fewest = part.channels < part.inputs ? part.channels : part.inputs;
#if defined(__AVX512F__)
    if (fewest > 8) return {width16::forward, width16::backward, width16::kept_floats};
#endif
#if defined(__AVX__)
    if (fewest > 4) return {width8::forward, width8::backward, width8::kept_floats};
#endif
    return {width4::forward, width4::backward, width4::kept_floats};
}

} // namespace

extern "C" {

// Each takes the parts in the order in which they are to be worked on; returns 1 where memory is lacking, else 0.
int parts_forward(const Part *parts, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (width_for(parts[i]).forward(parts[i])) return 1;
    return 0;
}

int parts_backward(const Part *parts, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (width_for(parts[i]).backward(parts[i])) return 1;
    return 0;
}

// Floats of Part::kept.
int64_t kept_floats(const Part *part) { return width_for(*part).kept_floats(*part); }

int vector_width() { return WIDEST; }

}
