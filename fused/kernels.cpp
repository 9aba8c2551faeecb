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
// Each image is worked on as a whole, in the cache of one core. Inside it lies as (groups, pixels, V): V floats are a
// register of the processor, or fewer where there are few channels; the last group is padded with zeros. Sums over the
// batch are taken per image or per chunk of images and added in a fixed order, so that no result depends on the number
// of threads.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
constexpr int FENCE = 16; // floats behind each part of the scratch memory that nobody may touch
#else
#define ASAN_POISON_MEMORY_REGION(at, size)
#define ASAN_UNPOISON_MEMORY_REGION(at, size)
constexpr int FENCE = 0;
#endif

struct Part { // as operation.py fills it
    int64_t batch, height, width, inputs, channels; // of x; channels of p
    int64_t kind, kernel, stride, dilation, relu;   // a Kind; ReLU before a convolution
    int64_t training, accumulate, threads;          // training: with the statistics of the batch, not the running ones
    double momentum, eps;
    const float *x, *depthwise, *pointwise;         // (B, H, W, inputs), (inputs, k, k), (channels, inputs)
    const float *gamma, *beta, *scale, *keep;       // (channels), (channels), (), (batch); each may be missing
    float *running_mean, *running_var;              // (channels); missing: there is no batch norm
    int64_t *tracked;
    float *statistics;                              // mean and 1 / std (2, channels), written forward, read backward
    float *out;                                     // (B, h, w, channels)
    const float *grad;                              // of out; the rest is written backward, grad_x added to if accumulate
    float *grad_x, *grad_depthwise, *grad_pointwise, *grad_gamma, *grad_beta, *grad_scale;
};

namespace {

enum Kind { NOTHING, CONV, MAX, MEAN, HALVES };

#if defined(__AVX512F__)
constexpr int WIDEST = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int WIDEST = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int WIDEST = 4, REGISTERS = 32;
#else
constexpr int WIDEST = 4, REGISTERS = 16;
#endif
constexpr int BLOCK = REGISTERS == 32 ? 8 : 12; // pixels of an image are padded to it: rows of a matrix that share a load
constexpr int STRETCH = 128; // pixels of a matrix product that stay in the innermost cache
constexpr int CHUNKS = 16;  // partial sums of the weight gradients

// Keeps GCC from loading a value again at each of its uses.
#if defined(__x86_64__)
#define IN_REGISTER(value) __asm__("" : "+v"(value))
#else
#define IN_REGISTER(value)
#endif

constexpr size_t padded(size_t floats) { return (floats + 15) / 16 * 16 + FENCE; }

// Scratch memory of a calling thread: it grows, and stays for the next call.
struct Arena {
    float *start = nullptr;
    size_t size = 0, used = 0;

    bool reserve(size_t floats) {
        used = 0;
        floats += 32 * FENCE;
        ASAN_UNPOISON_MEMORY_REGION(start, 4 * size);
        if (floats <= size) return true;
        free(start);
        size = (floats + 1023) / 1024 * 1024;
        start = static_cast<float *>(aligned_alloc(64, 4 * size));
        if (!start) size = 0;
        return start != nullptr;
    }
    float *take(size_t floats) {
        float *part = start + used;
        used += padded(floats);
        ASAN_POISON_MEMORY_REGION(start + used - FENCE, 4 * FENCE);
        return part;
    }
    float *zeros(size_t floats) {
        float *part = take(floats);
        if (floats) memset(part, 0, 4 * floats);
        return part;
    }
    ~Arena() {
        ASAN_UNPOISON_MEMORY_REGION(start, 4 * size);
        free(start);
    }
};

thread_local Arena arena;

// Of V floats; `loose` may lie anywhere. (GCC drops its alignment where it is a template argument: bug 97222.)
template <int V> struct Vectors;
#define VECTORS(V)                                                           \
    template <> struct Vectors<V> {                                          \
        typedef float vec __attribute__((vector_size(4 * V)));               \
        typedef float loose __attribute__((vector_size(4 * V), aligned(4))); \
        typedef int32_t mask __attribute__((vector_size(4 * V)));            \
    };
VECTORS(4)
VECTORS(8)
VECTORS(16)

template <int I> struct Int {
    static constexpr int value = I;
};

template <int V> struct Kernel {
    using vec = typename Vectors<V>::vec;
    using loose = typename Vectors<V>::loose;
    using mask = typename Vectors<V>::mask;

    const Part s;
    const int C, Cp, D, Dp, M;       // channels of p and of x; padded; of d
    const int grid;                  // a convolution with stride and dilation 2 is a plain one of every 2nd pixel
    const int k, kk, stride, dilation, pad;
    const int H, W, Hp, Wp;          // what is read of the input, and with its border of zeros
    const int h, w, n, np;           // output; its pixels; the same in whole blocks
    const bool halves, conv, deep, apart, pool, stored; // deep: with depthwise weights; apart: d is not x in its border;
                                                        // stored: p is not x
    const size_t input, pixels, filtered; // of an image, as floats: x, p, d
    const size_t frame, bordered;         // x in its border: of a group; of what is needed at a time
    const size_t plane, row;              // of a group of p; of a pixel of p

    static int up(int value, int unit) { return (value + unit - 1) / unit * unit; }

    explicit Kernel(const Part &part)
        : s(part), C(s.channels), Cp(up(C, V)), D(s.inputs), Dp(up(D, V)), M(s.kind == HALVES ? 2 * Dp : Dp),
          grid(s.kind == CONV && s.stride == 2 && s.dilation == 2 ? 2 : 1), k(s.kernel), kk(k * k),
          stride(s.stride / grid), dilation(s.dilation / grid), pad(dilation * (k / 2)), H((s.height + grid - 1) / grid),
          W((s.width + grid - 1) / grid), Hp(H + 2 * pad + (s.kind == HALVES)), Wp(W + 2 * pad + (s.kind == HALVES)),
          h((H + stride - 1) / stride), w((W + stride - 1) / stride), n(h * w), np(up(n, BLOCK)), halves(s.kind == HALVES),
          conv(s.kind == CONV || halves), deep(conv && s.depthwise), apart(deep || halves),
          pool(s.kind == MAX || s.kind == MEAN), stored(conv || pool || C != Cp),
          input(size_t(s.height) * s.width * D), pixels(size_t(np) * Cp), filtered(size_t(np) * M),
          frame(size_t(up(Hp * Wp, BLOCK)) * V), bordered(conv && !apart ? frame * (Dp / V) : frame),
          plane(stored ? size_t(np) * V : V), row(stored ? V : C) {}

    static vec get(const float *at) { return *reinterpret_cast<const loose *>(at); }
    static void set(float *at, vec v) { *reinterpret_cast<loose *>(at) = v; }
    static vec positive(vec v) { return v <= vec{} ? vec{} : v; } // keeps NaN

    // V channels of a pixel of an image that is not padded: all of them are its own; or some are the next pixel's;
    // or the image ends.
    struct Own {
        int64_t row; // floats a pixel
        vec load(const float *image, int64_t i) const { return get(image + i * row); }
        void store(float *image, int64_t i, vec v) const { set(image + i * row, v); }
    };
    struct Shared {
        int64_t row;
        mask own;
        vec load(const float *image, int64_t i) const { return (vec)((mask)get(image + i * row) & own); }
        void store(float *image, int64_t i, vec v) const { set(image + i * row, own ? v : get(image + i * row)); }
    };
    struct Last {
        int64_t row, rest;
        vec load(const float *image, int64_t i) const {
            vec v = {};
            memcpy(&v, image + i * row, 4 * rest);
            return v;
        }
        void store(float *image, int64_t i, vec v) const { memcpy(image + i * row, &v, 4 * rest); }
    };

    // body(pixel, lanes, parity) for the pixels from first to last of `count`, at their channels from g on
    template <typename Body>
    static void each(int channels, int64_t count, int g, int64_t first, int64_t last, Body body) {
        const int64_t rest = channels - g;
        if (rest >= V) return pairs(first, last, Own{channels}, body);
        mask own = {};
        for (int j = 0; j < rest; j++) own[j] = -1;
        const int64_t spare = count * channels - g - V; // what is left after V floats of the first pixel
        int64_t whole = spare < 0 ? 0 : spare / channels + 1;
        whole = whole < first ? first : whole < last ? whole : last;
        pairs(first, whole, Shared{channels, own}, body);
        pairs(whole, last, Last{channels, rest}, body);
    }
    template <typename Lanes, typename Body> static void pairs(int64_t i, int64_t last, Lanes lanes, Body &body) {
        for (; i + 2 <= last; i += 2) body(i, lanes, Int<0>()), body(i + 1, lanes, Int<1>());
        if (i < last) body(i, lanes, Int<0>());
    }

    // The middle of a border: its first pixel.
    template <typename Float> Float *inside(Float *border) const { return border + (size_t(pad) * Wp + pad) * V; }

    // body(pixel of the input, its place in the border, lanes) for all pixels at their V channels from g on
    template <typename Body> void framed(int g, Body body) const {
        for (int y = 0; y < H; y++) {
            const int64_t first = y * grid * s.width, at = int64_t(y) * Wp * V;
            if (grid == 1) {
                each(D, s.height * s.width, g, first, first + W,
                     [&](int64_t i, auto lanes, auto) { body(i, at + (i - first) * V, lanes); });
                continue;
            }
            for (int x = 0; x < W; x++)
                each(D, s.height * s.width, g, first + x * grid, first + x * grid + 1,
                     [&](int64_t i, auto lanes, auto) { body(i, at + x * V, lanes); });
        }
    }

    // A group of the input image into the middle of its border.
    void enclose(int g, const float *image, float *border) const {
        const float *from = image + g;
        float *to = inside(border);
        if (s.relu) framed(g, [=](int64_t i, int64_t at, auto lanes) { set(to + at, positive(lanes.load(from, i))); });
        else framed(g, [=](int64_t i, int64_t at, auto lanes) { set(to + at, lanes.load(from, i)); });
    }

    // The gradient of a group of the input image from the middle of a border, cut off where the ReLU did.
    void extract(int g, const float *border, const float *image, float *grad_x) const {
        const float *from = inside(border), *x = image + g;
        float *to = grad_x + g;
        const bool relu = s.relu, add = s.accumulate;
        framed(g, [=](int64_t i, int64_t at, auto lanes) {
            vec v = get(from + at);
            if (relu) v = lanes.load(x, i) <= vec{} ? vec{} : v;
            lanes.store(to, i, add ? v + lanes.load(to, i) : v);
        });
    }

    // Pixels of a group of the output (h, w) to every stride-th pixel of the middle of a border.
    void spread(const float *from, float *border) const {
        const int step = stride * V;
        for (int y = 0; y < h; y++) {
            float *to = inside(border) + size_t(y) * stride * Wp * V;
            for (int x = 0; x < w; x++, to += step, from += V) set(to, get(from));
        }
    }

    // call(x's pixel, d's pixel) for the even and for the odd pixels of a group; x in its border
    template <typename Call> void each_half(int g, float *x, float *d, Call call) const {
        for (int half = 0; half < 2; half++) {
            float *at = d + (half * size_t(Dp) + g) * np;
            for (int r = 0; r < h; r++)
                for (int c = 0; c < w; c++, at += V) call(x + (size_t(2 * r + half) * Wp + 2 * c + half) * V, at);
        }
    }

    // N neighbouring pixels of a depthwise convolution; every pixel of x is loaded once a row of taps.
    template <int K, int S, int E, int N>
    static void filter_pixels(const float *x, const float *taps, float *y, size_t line) {
        vec sum[N] = {};
#pragma GCC unroll 7
        for (int i = 0; i < K; i++, x += E * line) {
            vec tap[K];
#pragma GCC unroll 7
            for (int j = 0; j < K; j++) {
                tap[j] = get(taps + (i * K + j) * V);
                IN_REGISTER(tap[j]);
            }
#pragma GCC unroll 32
            for (int p = 0; p <= (N - 1) * S + (K - 1) * E; p++) {
                vec v = get(x + p * V);
                IN_REGISTER(v);
#pragma GCC unroll 8
                for (int m = 0; m < N; m++)
                    if (p >= m * S && (p - m * S) % E == 0 && (p - m * S) / E < K) sum[m] += tap[(p - m * S) / E] * v;
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < N; m++) set(y + m * V, sum[m]);
    }

    // y (rows, columns) of the group at x, `leap` pixels a row, from x with its border; stride S, dilation E
    template <int K, int S, int E>
    void filter_of(const float *x, const float *taps, float *y, int rows, int columns, int leap) const {
        constexpr int N = REGISTERS == 32 && K < 7 ? 8 : 4;
        const size_t line = size_t(Wp) * V, next = size_t(leap) * V;
        for (int r = 0; r < rows; r++, x += S * line, y += next) {
            int c = 0;
            for (; c + N <= columns; c += N) filter_pixels<K, S, E, N>(x + c * S * V, taps, y + c * V, line);
            if (c < columns && columns >= N) c = columns - N, filter_pixels<K, S, E, N>(x + c * S * V, taps, y + c * V, line);
            else
                for (; c < columns; c++) filter_pixels<K, S, E, 1>(x + c * S * V, taps, y + c * V, line);
        }
    }

    // sums (R K, V) += over the output's pixels, x at R rows of taps times up; x with its border
    template <int K, int S, int E, int R> void correlate_rows(const float *x, const float *up, float *sums) const {
        const size_t line = size_t(Wp) * V;
        vec total[R * K];
#pragma GCC unroll 49
        for (int t = 0; t < R * K; t++) total[t] = get(sums + t * V);
        for (int r = 0; r < h; r++) {
            const float *at[R];
#pragma GCC unroll 7
            for (int i = 0; i < R; i++) at[i] = x + (r * S + i * E) * line;
            for (int c = 0; c < w; c++, up += V) {
                const vec v = get(up);
#pragma GCC unroll 7
                for (int i = 0; i < R; i++) {
#pragma GCC unroll 7
                    for (int j = 0; j < K; j++) total[i * K + j] += v * get(at[i] + j * E * V);
                    at[i] += S * V;
                }
            }
        }
#pragma GCC unroll 49
        for (int t = 0; t < R * K; t++) set(sums + t * V, total[t]);
    }
    template <int K, int S, int E> void correlate_of(const float *x, const float *up, float *sums) const {
        constexpr int FIT = (REGISTERS - 4) / K, R = FIT < 1 ? 1 : FIT < K ? FIT : K; // sums that stay in registers
        const size_t line = size_t(Wp) * V;
        int i = 0;
        for (; i + R <= K; i += R) correlate_rows<K, S, E, R>(x + i * E * line, up, sums + i * K * V);
        if constexpr (K % R) correlate_rows<K, S, E, K % R>(x + i * E * line, up, sums + i * K * V);
    }

    // call(k, stride, dilation) with all three known to the compiler
    template <typename Call> static void with_taps(int k, int stride, int dilation, Call call) {
        auto known = [&](auto K, auto S) {
            if (dilation == 1) return call(K, S, Int<1>());
            if constexpr (K.value < 7) call(K, S, Int<2>());
        };
        with_side(k, [&](auto K) { stride == 1 ? known(K, Int<1>()) : known(K, Int<2>()); });
    }
    template <typename Call> static void with_side(int k, Call call) {
        k == 3 ? call(Int<3>()) : k == 5 ? call(Int<5>()) : call(Int<7>());
    }

    void filter(const float *x, const float *taps, float *y, int rows, int columns, int leap, int step) const {
        with_taps(k, step, dilation, [&](auto K, auto S, auto E) {
            filter_of<K.value, S.value, E.value>(x, taps, y, rows, columns, leap);
        });
    }
    void correlate(const float *x, const float *up, float *sums) const {
        with_taps(k, stride, dilation,
                  [&](auto K, auto S, auto E) { correlate_of<K.value, S.value, E.value>(x, up, sums); });
    }

    // The two factors and the result of a matrix product, P rows and G vectors at a time.
    struct Product {
        const float *a; // element (row, t): row ROW + t STEP, `group` floats further for every V of t where STEP is 1
        size_t group;
        const float *b; // vector (t, g)
        size_t b_step, b_plane;
        float *y; // vector (row, g)
        size_t y_row, y_plane;
        int count; // of t

        // y = or += a b
        template <int ROW, int STEP, bool ADD, int P, int G> void block(int row, int g) const {
            const float *from = a + row * ROW, *lines = b + g * b_plane;
            float *to = y + row * y_row + g * y_plane;
            vec sum[P][G] = {};
            if (ADD)
#pragma GCC unroll 8
                for (int p = 0; p < P; p++)
#pragma GCC unroll 3
                    for (int q = 0; q < G; q++) sum[p][q] = get(to + p * y_row + q * y_plane);
            for (int first = 0; first < count; first += STEP == 1 ? V : count, from += group) {
                const int stop = STEP == 1 && count - first > V ? V : count - first;
                for (int t = 0; t < stop; t++, lines += b_step) {
                    vec line[G];
#pragma GCC unroll 3
                    for (int q = 0; q < G; q++) {
                        line[q] = get(lines + q * b_plane);
                        IN_REGISTER(line[q]);
                    }
#pragma GCC unroll 8
                    for (int p = 0; p < P; p++)
#pragma GCC unroll 3
                        for (int q = 0; q < G; q++) sum[p][q] += from[p * ROW + t * STEP] * line[q];
                }
            }
#pragma GCC unroll 8
            for (int p = 0; p < P; p++)
#pragma GCC unroll 3
                for (int q = 0; q < G; q++) set(to + p * y_row + q * y_plane, sum[p][q]);
        }
        template <int ROW, int STEP, bool ADD, int G> void strip(int rows, int g) const {
            constexpr int P = G == 1 || REGISTERS == 32 ? 8 : G == 2 && ROW == V ? 6 : 4;
            int r = 0;
            for (; r + P <= rows; r += P) block<ROW, STEP, ADD, P, G>(r, g);
            for (; r < rows; r += 4) block<ROW, STEP, ADD, 4, G>(r, g);
        }
        // for `rows` rows, a multiple of 4
        template <int ROW, int STEP, bool ADD> void all(int rows, int groups) const {
            for (int g = 0, left; (left = groups - g) > 0;) {
                if (left == 1) strip<ROW, STEP, ADD, 1>(rows, g), g += 1;
                else if (left == 2 || left == 4) strip<ROW, STEP, ADD, 2>(rows, g), g += 2;
                else strip<ROW, STEP, ADD, 3>(rows, g), g += 3;
            }
        }
    };
    // p (Cp) of every pixel from d, the gradient of d from that of p, and matrix (M, Cp) += sum over the pixels of
    // grad_p d. With HALVES a half of d and its half of p are worked on apart: `shared` groups of p belong to both.
    void multiply(const float *d, const float *matrix, float *p) const {
        const size_t plane = size_t(np) * V;
        const auto part = [&](int from, int count, int first, int last) {
            if (first < last)
                Product{d + from / V * plane, plane, matrix + (size_t(from) * Cp + first * V), size_t(Cp), V,
                        p + first * plane, V, plane, count}.template all<V, 1, false>(np, last - first);
        };
        const int even = C / 2 / V, odd = (C / 2 + V - 1) / V;
        if (!halves) return part(0, D, 0, Cp / V);
        part(0, Dp, 0, even), part(0, M, even, odd), part(Dp, Dp, odd, Cp / V);
    }
    void multiply_back(const float *grad_p, const float *transposed, float *grad_d) const {
        const size_t plane = size_t(np) * V;
        const auto part = [&](int from, int to, int first, int groups) {
            Product{grad_p + from / V * plane, plane, transposed + (size_t(from) * M + first * V), size_t(M), V,
                    grad_d + first * plane, V, plane, to - from}.template all<V, 1, false>(np, groups);
        };
        if (!halves) return part(0, C, 0, Dp / V);
        part(0, C / 2, 0, Dp / V), part(C / 2 / V * V, C, Dp / V, Dp / V);
    }
    void outer(const float *grad_p, const float *d, float *matrix) const {
        const size_t plane = size_t(np) * V;
        for (int first = 0; first < n; first += STRETCH)
            for (int c = 0; c < Cp; c += V) {
                const int left = halves && c >= C / 2 ? Dp : 0, right = halves && c + V <= C / 2 ? Dp : M;
                Product{grad_p + c / V * plane + first * V, 0, d + left / V * plane + first * V, V, plane,
                        matrix + (c * size_t(M) + left), size_t(M), V, n - first < STRETCH ? n - first : STRETCH}
                    .template all<1, V, true>(C - c < V ? up(C - c, 4) : V, (right - left) / V);
            }
    }

    // Pooling goes along one axis of a group, then along the other: taps are `step` floats apart, pixels x, rows y.
    struct Axis {
        int rows, columns;
        size_t y, x, step;
    };
    Axis across() const { return {Hp, w, size_t(Wp) * V, size_t(stride) * V, V}; }
    Axis down() const { return {h, w, size_t(stride) * w * V, V, size_t(w) * V}; }
    size_t half() const { return size_t(Hp) * w * V; } // of a group, after the first axis
    size_t halfway() const { return pool ? padded(half()) : 0; }

    void pool_axis(Axis axis, const float *x, float *y) const {
        with_side(k, [&](auto K) { s.kind == MEAN ? pool_of<K.value, true>(axis, x, y) : pool_of<K.value, false>(axis, x, y); });
    }
    template <int K, bool MEANS> void pool_of(Axis axis, const float *x, float *y) const {
        for (int r = 0; r < axis.rows; r++, x += axis.y)
            for (int c = 0; c < axis.columns; c++, y += V) {
                const float *from = x + c * axis.x;
                vec v = get(from);
#pragma GCC unroll 7
                for (int i = 1; i < K; i++) {
                    const vec u = get(from + i * axis.step);
                    v = MEANS ? v + u : (u > v) | (u != u) ? u : v;
                }
                set(y, v);
            }
    }
    // Adds the gradient of y to that of x; that of a maximum goes to the first that has it.
    void pool_axis_back(Axis axis, const float *x, const float *y, const float *grad_y, float *grad_x) const {
        with_side(k, [&](auto K) {
            s.kind == MEAN ? pool_back_of<K.value, true>(axis, x, y, grad_y, grad_x)
                           : pool_back_of<K.value, false>(axis, x, y, grad_y, grad_x);
        });
    }
    template <int K, bool MEANS>
    void pool_back_of(Axis axis, const float *x, const float *y, const float *grad_y, float *grad_x) const {
        for (int r = 0; r < axis.rows; r++, x += axis.y, grad_x += axis.y)
            for (int c = 0; c < axis.columns; c++, y += V, grad_y += V) {
                const float *from = x + c * axis.x;
                float *to = grad_x + c * axis.x;
                const vec top = get(y);
                vec left = get(grad_y);
#pragma GCC unroll 7
                for (int i = 0; i < K; i++, from += axis.step, to += axis.step) {
                    if (MEANS) {
                        set(to, get(to) + left);
                        continue;
                    }
                    const auto here = get(from) == top;
                    set(to, get(to) + (here ? left : vec{}));
                    left = here ? vec{} : left;
                }
            }
    }
    // Divides by the pixels of each window that are no padding.
    void average(float *p) const {
        for (int r = 0; r < h; r++)
            for (int c = 0; c < w; c++, p += V) set(p, get(p) / float(extent(r, H) * extent(c, W)));
    }
    int extent(int index, int size) const {
        const int first = index * stride - pad, last = first + k < size ? first + k : size;
        return last - (first > 0 ? first : 0);
    }
    void pooling(const float *x, float *between, float *p) const {
        pool_axis(across(), x, between);
        pool_axis(down(), between, p);
        if (s.kind == MEAN) average(p);
    }
    // grad_p is divided in place for MEAN
    void pooling_back(const float *x, const float *p, float *grad_p, float *between, float *grad_between,
                      float *grad) const {
        memset(grad, 0, 4 * frame), memset(grad_between, 0, 4 * half());
        if (s.kind == MEAN) average(grad_p);
        else pool_axis(across(), x, between);
        pool_axis_back(down(), between, p, grad_p, grad_between);
        pool_axis_back(across(), x, between, grad_between, grad);
    }

    // What lies around an image: zeros, or what no maximum can be.
    void clear(float *border) const {
        for (size_t i = 0; i < bordered; i++) border[i] = s.kind == MAX ? -INFINITY : 0;
    }

    // Weights as the loops above want them: taps (groups, k k, V), matrix (M, Cp); turned and transposed for gradients.
    struct Weights {
        float *taps, *matrix, *turned, *transposed;
    };
    size_t taps_size() const { return deep ? padded(size_t(kk) * Dp) : 0; }
    size_t square() const { return conv ? padded(size_t(Cp) * M) : 0; }

    Weights pack(bool backward) const {
        Weights p = {arena.zeros(taps_size()), arena.zeros(square()), nullptr, nullptr};
        if (backward) p.turned = arena.zeros(taps_size()), p.transposed = arena.zeros(square());
        for (int t = 0; deep && t < kk; t++)
            for (int d = 0; d < D; d++) {
                p.taps[(d / V * kk + t) * V + d % V] = s.depthwise[d * kk + t];
                if (backward) p.turned[(d / V * kk + kk - 1 - t) * V + d % V] = s.depthwise[d * kk + t];
            }
        for (int c = 0; conv && c < C; c++)
            for (int d = 0; d < D; d++) {
                const int m = d + second(c);
                p.matrix[m * Cp + c] = s.pointwise[c * D + d];
                if (backward) p.transposed[c * M + m] = s.pointwise[c * D + d];
            }
        return p;
    }

    // Where d's channels for the channel c of p begin.
    int second(int c) const { return halves && c >= C / 2 ? Dp : 0; }

    // Scratch of a thread to project: x with its border, and d or what pooling has halfway.
    size_t own() const { return conv || pool ? padded(bordered) + halfway() : 0; }

    // x of an image -> p (np, Cp); d (np, Dp), kept by the caller, is filled where there is a depthwise convolution.
    const float *project(const float *x, const Weights &weights, float *border, float *d, float *p) const {
        if (!stored) return x;
        if (!conv && !pool) {
            for (int g = 0; g < Cp; g += V)
                each(C, n, g, 0, n, [to = p + g / V * plane, g, x](int64_t i, auto lanes, auto) {
                    set(to + i * V, lanes.load(x + g, i));
                });
            return p;
        }
        for (int g = 0; g < Dp; g += V) { // a group at a time: its border stays in the innermost cache
            float *at = apart || pool ? border : border + g / V * frame;
            enclose(g, x, at);
            if (pool) pooling(border, border + padded(bordered), p + g * size_t(np));
            if (deep) filter(border, weights.taps + g * kk, d + g * size_t(np), h, w, w, stride);
            if (halves) each_half(g, border, d, [](const float *from, float *to) { set(to, get(from)); });
        }
        if (pool) return p;
        if (apart) blank(d);
        multiply(apart ? d : border, weights.matrix, p);
        return p;
    }
    // The pixels of d that only fill the last block.
    void blank(float *d) const {
        for (int g = 0; g < M / V; g++) memset(d + (size_t(g) * np + n) * V, 0, 4 * size_t(np - n) * V);
    }

    // Mean and sum of squared deviations of an image, each (Cp).
    void moments(const float *p, float *mean, float *squares) const {
        const int64_t row = this->row, count = n;
        for (int g = 0; g < Cp; g += V, p += plane) {
            vec sum[2] = {}, square[2] = {};
            const auto total = [&](int64_t i, auto, auto parity) { sum[parity.value] += get(p + i * row); };
            pairs(0, count, Own{row}, total);
            const vec middle = (sum[0] + sum[1]) / float(count);
            const auto deviation = [&](int64_t i, auto, auto parity) {
                const vec gap = get(p + i * row) - middle;
                square[parity.value] += gap * gap;
            };
            pairs(0, count, Own{row}, deviation);
            set(mean + g, middle), set(squares + g, square[0] + square[1]);
        }
    }

    // From the moments of every image (B, 2, Cp) to mean and 1 / std of the batch; the running ones follow.
    void statistics(const float *parts) const {
        const double images = s.batch, count = images * n;
        for (int c = 0; c < C; c++) {
            double middle = 0, squares = 0;
            for (int b = 0; b < s.batch; b++) middle += parts[size_t(b) * 2 * Cp + c];
            middle /= images;
            for (int b = 0; b < s.batch; b++) {
                const double gap = parts[size_t(b) * 2 * Cp + c] - middle;
                squares += parts[(size_t(b) * 2 + 1) * Cp + c] + n * gap * gap;
            }
            s.statistics[c] = float(middle), s.statistics[C + c] = float(1 / sqrt(squares / count + s.eps));
            s.running_mean[c] += float(s.momentum * (middle - s.running_mean[c]));
            s.running_var[c] += float(s.momentum * (squares / (count - 1) - s.running_var[c]));
        }
        if (s.momentum != 0) ++*s.tracked;
    }
    void given_statistics() const {
        for (int c = 0; c < C; c++) {
            s.statistics[c] = s.running_mean ? s.running_mean[c] : 0;
            s.statistics[C + c] = s.running_mean ? float(1 / sqrt(double(s.running_var[c]) + s.eps)) : 1;
        }
    }

    float scale() const { return s.scale ? *s.scale : 1; }
    float gamma(int c) const { return s.gamma ? s.gamma[c] : 1; }
    float keep(int image) const { return s.keep ? s.keep[image] : 1; }

    // a and b of y = a p + b, each (Cp), zero in the padding
    void affine(float *a, float *b) const {
        for (int c = 0; c < C; c++) {
            a[c] = scale() * gamma(c) * s.statistics[C + c];
            b[c] = scale() * (s.beta ? s.beta[c] : 0) - a[c] * s.statistics[c];
        }
    }

    void finish(const float *p, const float *a, const float *b, float keep, float *out) const {
        const bool add = s.accumulate;
        const int64_t row = this->row;
        for (int g = 0; g < Cp; g += V, p += plane) {
            const vec slope = keep * get(a + g), shift = keep * get(b + g);
            each(C, n, g, 0, n, [=](int64_t i, auto lanes, auto) {
                const vec y = slope * get(p + i * row) + shift;
                lanes.store(out + g, i, add ? y + lanes.load(out + g, i) : y);
            });
        }
    }

    int forward() const {
        const size_t all = stored ? padded(s.batch * pixels) : 0, deeper = apart ? padded(filtered) : 0;
        const size_t mine = own() + deeper;
        if (!arena.reserve(taps_size() + square() + 2 * padded(Cp) + padded(size_t(s.batch) * 2 * Cp) + all +
                           s.threads * mine))
            return 1;
        const Weights weights = pack(false);
        float *a = arena.zeros(Cp), *b = arena.zeros(Cp), *parts = arena.take(size_t(s.batch) * 2 * Cp);
        float *projected = arena.take(all), *owned = arena.take(s.threads * mine);

#pragma omp parallel num_threads(s.threads)
        {
            float *border = owned + omp_get_thread_num() * mine, *d = border + own();
            if (mine) clear(border);
#pragma omp for schedule(static)
            for (int i = 0; i < s.batch; i++) {
                const float *p = project(s.x + i * input, weights, border, d, projected + (stored ? i * pixels : 0));
                float *part = parts + size_t(i) * 2 * Cp;
                if (s.training) moments(p, part, part + Cp);
            }
#pragma omp single
            {
                s.training ? statistics(parts) : given_statistics();
                affine(a, b);
            }
#pragma omp for schedule(static)
            for (int i = 0; i < s.batch; i++)
                finish(stored ? projected + i * pixels : s.x + i * input, a, b, keep(i), s.out + size_t(i) * n * C);
        }
        return 0;
    }

    // Sums over an image of y's gradient and of it times normalised p, each (Cp).
    void sums(const float *grad, const float *p, const float *mean, const float *invstd, float keep, float *sum,
              float *product) const {
        const int64_t row = this->row;
        for (int g = 0; g < Cp; g += V, p += plane) {
            const vec middle = get(mean + g);
            vec total[2] = {}, weighted[2] = {};
            each(C, n, g, 0, n, [&](int64_t i, auto lanes, auto parity) {
                const vec up = lanes.load(grad + g, i);
                total[parity.value] += up, weighted[parity.value] += up * (get(p + i * row) - middle);
            });
            set(sum + g, keep * (total[0] + total[1]));
            set(product + g, keep * (weighted[0] + weighted[1]) * get(invstd + g));
        }
    }

    int backward() const {
        const int chunks = s.batch < CHUNKS ? s.batch : CHUNKS;
        const size_t part = taps_size() + square(), gradients = conv || pool ? padded(pixels) : 0;
        const size_t deeper = conv ? padded(filtered) : 0, mine = own() + (conv || pool ? padded(bordered) : 0) +
                                                                  halfway() + gradients + deeper;
        const size_t all = stored ? padded(s.batch * pixels) : 0, all_d = apart ? padded(s.batch * filtered) : 0;
        if (!arena.reserve(2 * part + 6 * padded(Cp) + padded(size_t(s.batch) * 2 * Cp) + chunks * part + all + all_d +
                           s.threads * mine))
            return 1;
        const Weights weights = pack(true);
        float *a = arena.zeros(Cp), *b = arena.zeros(Cp), *mean = arena.zeros(Cp), *invstd = arena.zeros(Cp);
        float *slope = arena.zeros(Cp), *shift = arena.zeros(Cp); // gradient of p = a up + slope (p - mean) + shift
        float *parts = arena.take(size_t(s.batch) * 2 * Cp), *partial = arena.zeros(chunks * part);
        float *projected = arena.take(all), *depths = arena.take(all_d), *owned = arena.take(s.threads * mine);
        memcpy(mean, s.statistics, 4 * C), memcpy(invstd, s.statistics + C, 4 * C);
        affine(a, b);

#pragma omp parallel num_threads(s.threads)
        {
            float *border = owned + omp_get_thread_num() * mine, *between = border + padded(bordered);
            float *grad_border = border + own(), *grad_between = grad_border + padded(bordered);
            float *grad_p = grad_between + halfway(), *grad_d = grad_p + gradients;
            if (mine) {
                clear(border);
                memset(grad_border, 0, 4 * (mine - own()));
            }
#pragma omp for schedule(static)
            for (int i = 0; i < s.batch; i++) {
                const float *p = project(s.x + i * input, weights, border, depths + (apart ? i * filtered : 0),
                                         projected + (stored ? i * pixels : 0));
                float *both = parts + size_t(i) * 2 * Cp;
                sums(s.grad + size_t(i) * n * C, p, mean, invstd, keep(i), both, both + Cp);
            }
#pragma omp single
            combine(parts, a, slope, shift);
#pragma omp for schedule(static)
            for (int chunk = 0; chunk < chunks; chunk++)
                for (int i = chunk * s.batch / chunks; i < (chunk + 1) * s.batch / chunks; i++) {
                    const float *image = s.x + i * input, *p = stored ? projected + i * pixels : image;
                    float *result = s.grad_x + i * input;
                    gradient(s.grad + size_t(i) * n * C, p, a, mean, slope, shift, keep(i), grad_p, result);
                    if (!conv && !pool) continue;
                    if (grid > 1 && !s.accumulate) memset(result, 0, 4 * input);
                    float *taps = partial + chunk * part, *matrix = taps + taps_size();
                    if (conv && !apart)
                        for (int g = 0; g < Dp; g += V) enclose(g, image, border + g / V * frame);
                    if (conv) {
                        outer(grad_p, apart ? depths + i * filtered : border, matrix);
                        multiply_back(grad_p, weights.transposed, grad_d);
                    }
                    for (int g = 0; g < Dp; g += V) {
                        const size_t at = g * size_t(np);
                        if (pool || deep) enclose(g, image, border);
                        if (pool) pooling_back(border, p + at, grad_p + at, between, grad_between, grad_border);
                        if (deep) {
                            correlate(border, grad_d + at, taps + g * kk);
                            // x's gradient: a plain convolution of d's, spread over the strides, with turned taps
                            spread(grad_d + at, grad_border);
                            filter(grad_border, weights.turned + g * kk, inside(border), H, W, Wp, 1);
                        }
                        if (halves)
                            each_half(g, grad_border, grad_d, [](float *to, const float *from) { set(to, get(from)); });
                        extract(g, deep ? border : pool || halves ? grad_border : grad_d + at, image, result);
                    }
                }
            if (conv) collect(partial, chunks, part);
        }
        return 0;
    }

    // The sums over the images (B, 2, Cp): gradients of gamma, beta and scale, and what the statistics pass on.
    void combine(const float *parts, const float *a, float *slope, float *shift) const {
        const double count = double(s.batch) * n;
        double products = 0; // the gradient of scale
        for (int c = 0; c < C; c++) {
            double sum = 0, product = 0;
            for (int i = 0; i < s.batch; i++) {
                sum += parts[size_t(i) * 2 * Cp + c], product += parts[(size_t(i) * 2 + 1) * Cp + c];
            }
            if (s.grad_gamma) s.grad_gamma[c] = float(scale() * product);
            if (s.grad_beta) s.grad_beta[c] = float(scale() * sum);
            products += gamma(c) * product + (s.beta ? s.beta[c] * sum : 0);
            if (!s.training) continue; // the statistics do not depend on x
            slope[c] = float(-a[c] * s.statistics[C + c] * product / count), shift[c] = float(-a[c] * sum / count);
        }
        if (s.grad_scale) *s.grad_scale = float(products);
    }

    // The gradient of p of an image, into grad_p (np, Cp) or, where p is x, into x's.
    void gradient(const float *grad, const float *p, const float *a, const float *mean, const float *slope,
                  const float *shift, float keep, float *grad_p, float *grad_x) const {
        const bool inner = conv || pool, add = s.accumulate;
        const int64_t row = this->row;
        for (int g = 0; g < Cp; g += V, p += plane, grad_p += inner ? np * V : 0) {
            const vec times = keep * get(a + g), steep = get(slope + g), fixed = get(shift + g) - steep * get(mean + g);
            each(C, n, g, 0, n, [=](int64_t i, auto lanes, auto) {
                const vec v = times * lanes.load(grad + g, i) + (steep * get(p + i * row) + fixed);
                if (inner) set(grad_p + i * V, v);
                else lanes.store(grad_x + g, i, add ? v + lanes.load(grad_x + g, i) : v);
            });
        }
    }

    // The partial sums of the chunks to the gradients of the weights, in parallel over their rows.
    void collect(const float *partial, int chunks, size_t part) const {
        auto total = [&](const float *at) {
            vec sum = {};
            for (int chunk = 0; chunk < chunks; chunk++) sum += get(at + chunk * part);
            return sum;
        };
        if (deep)
#pragma omp for schedule(static) nowait
            for (int t = 0; t < kk; t++)
                for (int g = 0; g < Dp; g += V) {
                    const vec sum = total(partial + g * kk + t * V);
                    for (int j = 0; j < V && g + j < D; j++) s.grad_depthwise[(g + j) * kk + t] = sum[j];
                }
#pragma omp for schedule(static) nowait
        for (int c = 0; c < C; c++)
            for (int g = 0; g < Dp; g += V) {
                const vec sum = total(partial + taps_size() + size_t(c) * M + second(c) + g);
                memcpy(s.grad_pointwise + size_t(c) * D + g, &sum, 4 * (D - g < V ? D - g : V));
            }
    }
};

template <typename Call> int with_width(const Part &part, Call call) {
    const int64_t fewest = part.channels < part.inputs ? part.channels : part.inputs;
    if constexpr (WIDEST >= 16)
        if (fewest > 8) return call(Kernel<16>(part));
    if constexpr (WIDEST >= 8)
        if (fewest > 4) return call(Kernel<8>(part));
    return call(Kernel<4>(part));
}

} // namespace

extern "C" {

// Each takes the parts in the order in which they are to be worked on; returns 1 where memory is lacking, else 0.
int parts_forward(const Part *parts, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (with_width(parts[i], [](const auto &kernel) { return kernel.forward(); })) return 1;
    return 0;
}

int parts_backward(const Part *parts, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (with_width(parts[i], [](const auto &kernel) { return kernel.backward(); })) return 1;
    return 0;
}

int vector_width() { return WIDEST; }

}
