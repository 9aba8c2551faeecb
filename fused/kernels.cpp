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

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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
    float *kept;                                    // p as forward leaves it to backward, kept_floats(); may be missing
    const float *normal;                            // p normalised, like out; missing backward: p is kept or made again
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
constexpr int PIXELS = 64; // of a band, about
constexpr int CHUNKS = 16; // partial sums of the weight gradients

// Keeps GCC from loading a value again at each of its uses.
#if defined(__x86_64__)
#define IN_REGISTER(value) __asm__("" : "+v"(value))
#else
#define IN_REGISTER(value)
#endif

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
    const int h, w, n, np;           // output; its pixels; the same with room for a whole block of rows of a matrix
    const bool halves, conv, deep, apart, pool, stored; // deep: with depthwise weights; apart: d is not x in its border;
                                                        // stored: p is not x
    const int step, rows, band;      // of the output at a time: pixels; rows; their pixels with room for a block
    const size_t input, pixels;      // of an image, as floats: x, p
    const size_t line, frame, plane; // x in its border: a row, a group; a group of p
    const size_t bordered;           // what is needed of x in its border at a time

    static int up(int value, int unit) { return (value + unit - 1) / unit * unit; }

    explicit Kernel(const Part &part)
        : s(part), C(s.channels), Cp(up(C, V)), D(s.inputs), Dp(up(D, V)), M(s.kind == HALVES ? 2 * Dp : Dp),
          grid(s.kind == CONV && s.stride == 2 && s.dilation == 2 ? 2 : 1), k(s.kernel), kk(k * k),
          stride(s.stride / grid), dilation(s.dilation / grid), pad(dilation * (k / 2)), H((s.height + grid - 1) / grid),
          W((s.width + grid - 1) / grid), Hp(H + 2 * pad + (s.kind == HALVES)), Wp(W + 2 * pad + (s.kind == HALVES)),
          h((H + stride - 1) / stride), w((W + stride - 1) / stride), n(h * w), np(up(n + 3, 4)),
          halves(s.kind == HALVES), conv(s.kind == CONV || halves), deep(conv && s.depthwise), apart(deep || halves),
          pool(s.kind == MAX || s.kind == MEAN), stored(conv || pool), step(w < PIXELS ? PIXELS / w * w : w),
          rows(conv && step < n ? step / w : h),
          band(up(rows * w + 3, 4)), input(size_t(s.height) * s.width * D), pixels(size_t(np) * Cp), line(size_t(Wp) * V),
          frame(Hp * line), plane(size_t(np) * V), bordered(apart ? frame * (Dp / V) : pool ? frame : 0) {}

    // Rows of the output, those of the input that they need beyond the band before, and those whose gradient is
    // complete after them.
    struct Band {
        int first = 0, last = 0, read = 0, known = 0, done = 0, complete = 0;
    };
    template <typename Body> void bands(Body body) const {
        const int reach = pad + (halves ? 2 : 1); // rows of a window from its middle on
        for (Band b; b.last < h;) {
            b.first = b.last, b.read = b.known, b.done = b.complete;
            b.last = b.first + rows < h ? b.first + rows : h;
            b.known = (b.last - 1) * stride + reach < H ? (b.last - 1) * stride + reach : H;
            b.complete = b.last == h ? H : b.last * stride > pad ? b.last * stride - pad : 0;
            body(b);
        }
    }

    // body(first pixel, last pixel) a few at a time
    template <typename Body> void steps(Body body) const {
        for (int from = 0; from < n; from += step) body(from, from + step < n ? from + step : n);
    }

    // The images from first to last of the thread that asks.
    struct Share {
        int first, last;
        explicit Share(int64_t count) {
            const int64_t one = omp_get_thread_num(), all = omp_get_num_threads();
            first = one * count / all, last = (one + 1) * count / all;
        }
    };

    // p of an image: in its groups, or, without a plane, as an image that is not padded.
    struct Source {
        const float *start;
        size_t plane;
        const float *group(int g) const { return start + (plane ? g / V * plane : g); }
        template <typename Lanes> vec load(const float *group, int64_t i, Lanes lanes) const {
            return plane ? get(group + i * V) : lanes.load(group, i);
        }
    };

    static vec get(const float *at) { return *reinterpret_cast<const loose *>(at); }
    static void set(float *at, vec v) { *reinterpret_cast<loose *>(at) = v; }
    static vec positive(vec v) { return v <= vec{} ? vec{} : v; } // keeps NaN

    // V channels of a pixel of an image that is not padded: all of them are its own; or some are the next pixel's;
    // or the image ends.
    struct Whole {
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
        if (rest >= V) return pairs(first, last, Whole{channels}, body);
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
    float *inside(float *border) const { return border + pad * line + size_t(pad) * V; }

    // body(pixel of the input, its place, lanes) for the rows from y on, at their V channels from g on; a row of places
    // has `leap` floats
    template <typename Body> void framed(int g, int y, int last, size_t leap, Body body) const {
        for (int64_t at = 0; y < last; y++, at += leap) {
            const int64_t first = y * grid * s.width;
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

    // Asks for floats that are needed next: those that are the group g's of all channels.
    static void fetch(const float *next, int64_t count, int g, int channels) {
        const int64_t last = count * (g + V) / channels;
        for (int64_t i = count * g / channels; i < last; i += 16) __builtin_prefetch(next + i, 0, 2);
    }

    // Rows of a group of the input image to their places.
    void enclose(int g, int y, int last, const float *image, float *to, size_t leap) const {
        const float *from = image + g;
        const bool relu = s.relu;
        framed(g, y, last, leap, [=](int64_t i, int64_t at, auto lanes) {
            const vec v = lanes.load(from, i);
            set(to + at, relu ? positive(v) : v);
        });
    }

    // The gradient of rows of a group of the input image from their places, cut off where the ReLU did.
    void extract(int g, int y, int last, const float *from, size_t leap, const float *image, float *grad_x) const {
        const float *x = image + g;
        float *to = grad_x + g;
        const bool relu = s.relu, add = s.accumulate;
        const int64_t row = int64_t(grid) * s.width * D;
        fetch(grad_x + last * row, (last - y) * row, g, Dp);
        framed(g, y, last, leap, [=](int64_t i, int64_t at, auto lanes) {
            vec v = get(from + at);
            if (relu) v = lanes.load(x, i) <= vec{} ? vec{} : v;
            lanes.store(to, i, add ? v + lanes.load(to, i) : v);
        });
    }

    // Pixels of a band of a group to every stride-th pixel of the middle of a border.
    void spread(const Band &b, const float *from, float *border) const {
        for (int r = b.first; r < b.last; r++) {
            float *to = inside(border) + r * stride * line;
            for (int x = 0; x < w; x++, to += stride * V, from += V) set(to, get(from));
        }
    }

    // call(x's pixel, d's pixel) for the even and for the odd pixels of a band of a group; x in its border
    template <typename Call> void each_half(const Band &b, int g, float *x, float *d, Call call) const {
        for (int half = 0; half < 2; half++) {
            float *at = d + (half * size_t(Dp) + g) * band;
            for (int r = b.first; r < b.last; r++)
                for (int c = 0; c < w; c++, at += V) call(x + (2 * r + half) * line + (2 * c + half) * V, at);
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

    // y (rows, columns) of the group at x from x with its border; stride S, dilation E
    template <int K, int S, int E>
    void filter_of(const float *x, const float *taps, float *y, int rows, int columns) const {
        constexpr int N = REGISTERS == 32 && K < 7 ? 8 : 4;
        for (int r = 0; r < rows; r++, x += S * line, y += columns * V) {
            int c = 0;
            for (; c + N <= columns; c += N) filter_pixels<K, S, E, N>(x + c * S * V, taps, y + c * V, line);
            if (c < columns && columns >= N) {
                c = columns - N;
                filter_pixels<K, S, E, N>(x + c * S * V, taps, y + c * V, line);
            } else
                for (; c < columns; c++) filter_pixels<K, S, E, 1>(x + c * S * V, taps, y + c * V, line);
        }
    }

    // sums (R K, V) += over the pixels of `rows`, x at R rows of taps times up; x with its border
    template <int K, int S, int E, int R>
    void correlate_rows(const float *x, const float *up, float *sums, int rows) const {
        vec total[R * K];
#pragma GCC unroll 49
        for (int t = 0; t < R * K; t++) total[t] = get(sums + t * V);
        for (int r = 0; r < rows; r++) {
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
    template <int K, int S, int E> void correlate_of(const float *x, const float *up, float *sums, int rows) const {
        constexpr int FIT = (REGISTERS - 4) / K, R = FIT < 1 ? 1 : FIT < K ? FIT : K; // sums that stay in registers
        int i = 0;
        for (; i + R <= K; i += R) correlate_rows<K, S, E, R>(x + i * E * line, up, sums + i * K * V, rows);
        if constexpr (K % R) correlate_rows<K, S, E, K % R>(x + i * E * line, up, sums + i * K * V, rows);
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

    void filter(const float *x, const float *taps, float *y, int rows, int columns, int step) const {
        with_taps(k, step, dilation, [&](auto K, auto S, auto E) {
            filter_of<K.value, S.value, E.value>(x, taps, y, rows, columns);
        });
    }
    void correlate(const float *x, const float *up, float *sums, int rows) const {
        with_taps(k, stride, dilation,
                  [&](auto K, auto S, auto E) { correlate_of<K.value, S.value, E.value>(x, up, sums, rows); });
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
        // for `rows` rows; there is room for 3 more
        template <int ROW, int STEP, bool ADD> void all(int rows, int groups) const {
            for (int g = 0, left; (left = groups - g) > 0;) {
                if (left == 1) strip<ROW, STEP, ADD, 1>(rows, g), g += 1;
                else if (left == 2 || left == 4) strip<ROW, STEP, ADD, 2>(rows, g), g += 2;
                else strip<ROW, STEP, ADD, 3>(rows, g), g += 3;
            }
        }
    };
    // Of a band: p (Cp) of every pixel from d, the gradient of d from that of p, and matrix (M, Cp) += sum over the
    // pixels of grad_p d. With HALVES a half of d and its half of p are worked on apart; a group of p may be of both.
    void multiply(const float *d, const float *matrix, float *p, int count) const {
        const auto part = [&](int from, int stop, int first, int last) {
            if (first < last)
                Product{d + size_t(from) * band, size_t(band) * V, matrix + (size_t(from) * Cp + first * V), size_t(Cp),
                        V, p + first * plane, V, plane, stop}.template all<V, 1, false>(count, last - first);
        };
        const int even = C / 2 / V, odd = (C / 2 + V - 1) / V;
        if (!halves) return part(0, D, 0, Cp / V);
        part(0, Dp, 0, even), part(0, M, even, odd), part(Dp, Dp, odd, Cp / V);
    }
    void multiply_back(const float *grad_p, const float *transposed, float *grad_d, int count) const {
        const size_t plane = size_t(band) * V;
        const auto part = [&](int from, int to, int first, int groups) {
            Product{grad_p + from / V * plane, plane, transposed + (size_t(from) * M + first * V), size_t(M), V,
                    grad_d + first * plane, V, plane, to - from}.template all<V, 1, false>(count, groups);
        };
        if (!halves) return part(0, C, 0, Dp / V);
        part(0, C / 2, 0, Dp / V), part(C / 2 / V * V, C, Dp / V, Dp / V);
    }
    void outer(const float *grad_p, const float *d, float *matrix, int count) const {
        const size_t plane = size_t(band) * V;
        for (int c = 0; c < Cp; c += V) {
            const int left = halves && c >= C / 2 ? Dp : 0, right = halves && c + V <= C / 2 ? Dp : M;
            Product{grad_p + c / V * plane, 0, d + left / V * plane, V, plane, matrix + (c * size_t(M) + left),
                    size_t(M), V, count}.template all<1, V, true>(C - c < V ? up(C - c, 4) : V, (right - left) / V);
        }
    }

    // Pooling goes along one axis of a group, then along the other: taps are `step` floats apart, pixels x, rows y.
    struct Axis {
        int rows, columns;
        size_t y, x, step;
    };
    Axis across() const { return {Hp, w, size_t(Wp) * V, size_t(stride) * V, V}; }
    Axis down() const { return {h, w, size_t(stride) * w * V, V, size_t(w) * V}; }
    size_t halfway() const { return pool ? size_t(Hp) * w * V : 0; } // floats of a group after the first axis

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
        memset(grad, 0, 4 * frame), memset(grad_between, 0, 4 * halfway());
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

    // What a thread needs to project: x with its border, what pooling has halfway, d of a band.
    struct Own {
        float *border, *between, *d;
    };
    size_t own_size() const { return padded(bordered) + padded(halfway()) + padded(deeper()); }
    size_t deeper() const { return conv ? size_t(band) * M : 0; }
    Own take(Scratch &from) const {
        const Own own = {from.take(bordered), from.take(halfway()), from.take(deeper())};
        clear(own.border);
        return own;
    }

    // x of an image -> p; call(p, first pixel, last pixel) for every band of it
    template <typename Call>
    void project(const float *x, const Weights &weights, const Own &own, float *p, Call call) const {
        if (!stored) return steps([&](int from, int to) { call(Source{x, 0}, from, to); });
        if (pool) {
            for (int g = 0; g < Dp; g += V) {
                enclose(g, 0, H, x, inside(own.border), line);
                pooling(own.border, own.between, p + g / V * plane);
            }
            return call(Source{p, plane}, 0, n);
        }
        bands([&](const Band &b) {
            deepen(b, x, weights, own);
            multiply(own.d, weights.matrix, p + b.first * w * V, (b.last - b.first) * w);
            call(Source{p, plane}, b.first * w, b.last * w);
        });
    }
    // d of a band
    void deepen(const Band &b, const float *x, const Weights &weights, const Own &own) const {
        float *border = own.border;
        const int64_t row = int64_t(grid) * s.width * D;
        for (int g = 0; g < Dp; g += V, border += frame) {
            fetch(x + b.known * row, (b.last - b.first) * stride * row, g, Dp);
            float *at = own.d + size_t(g) * band;
            if (!apart) {
                enclose(g, b.first, b.last, x, at, size_t(W) * V);
                continue;
            }
            enclose(g, b.read, b.known, x, inside(border) + b.read * line, line);
            if (deep) filter(border + b.first * stride * line, weights.taps + g * kk, at, b.last - b.first, w, stride);
            else each_half(b, g, border, own.d, [](const float *from, float *to) { set(to, get(from)); });
        }
    }

    // Mean and sum of squared deviations (Cp) of the pixels up to `to` of an image from those up to `from`.
    void moments(Source p, int from, int to, float *mean, float *squares) const {
        const float count = to - from, part = count / to, both = part * from;
        for (int g = 0; g < Cp; g += V) {
            const float *at = p.group(g);
            vec sum[2] = {}, square[2] = {};
            each(C, n, g, from, to, [&](int64_t i, auto lanes, auto parity) {
                sum[parity.value] += p.load(at, i, lanes);
            });
            const vec middle = (sum[0] + sum[1]) / count;
            each(C, n, g, from, to, [&](int64_t i, auto lanes, auto parity) {
                const vec gap = p.load(at, i, lanes) - middle;
                square[parity.value] += gap * gap;
            });
            const vec before = from ? get(mean + g) : vec{}, gap = middle - before;
            set(mean + g, before + part * gap);
            set(squares + g, (from ? get(squares + g) : vec{}) + (square[0] + square[1]) + both * gap * gap);
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

    void finish(Source p, const float *a, const float *b, float keep, float *out) const {
        const bool add = s.accumulate;
        steps([&](int64_t from, int64_t to) {
            for (int g = 0; g < Cp; g += V) {
                const float *at = p.group(g);
                const vec slope = keep * get(a + g), shift = keep * get(b + g);
                fetch(out + to * C, (to - from) * C, g, Cp);
                each(C, n, g, from, to, [=](int64_t i, auto lanes, auto) {
                    const vec y = slope * p.load(at, i, lanes) + shift;
                    lanes.store(out + g, i, add ? y + lanes.load(out + g, i) : y);
                });
            }
        });
    }

    int forward() const {
        const size_t all = stored && !s.kept ? padded(s.batch * pixels) : 0, mine = own_size();
        if (!arena.reserve(taps_size() + square() + 2 * padded(Cp) + padded(size_t(s.batch) * 2 * Cp) + all +
                           s.threads * mine))
            return 1;
        const Weights weights = pack(false);
        float *a = arena.zeros(Cp), *b = arena.zeros(Cp), *parts = arena.take(size_t(s.batch) * 2 * Cp);
        float *projected = arena.take(all), *owned = arena.take(s.threads * mine);
        if (s.kept) projected = s.kept;

#pragma omp parallel num_threads(s.threads)
        {
            Scratch scratch{owned + omp_get_thread_num() * mine};
            const Own own = take(scratch);
            const Share images(s.batch);
            for (int i = images.first; i < images.last; i++) {
                float *mean = parts + size_t(i) * 2 * Cp;
                project(s.x + i * input, weights, own, projected + i * pixels, [&](Source p, int from, int to) {
                    if (s.training) moments(p, from, to, mean, mean + Cp);
                });
            }
#pragma omp barrier
#pragma omp single
            {
                s.training ? statistics(parts) : given_statistics();
                affine(a, b);
            }
            for (int i = images.last; i-- > images.first;) {
                const Source p = stored ? Source{projected + i * pixels, plane} : Source{s.x + i * input, 0};
                finish(p, a, b, keep(i), s.out + size_t(i) * n * C);
            }
        }
        return 0;
    }

    // Sums of y's gradient and of it times normalised p (Cp) of the pixels up to `to` from those up to `from`.
    void sums(const float *grad, Source p, int from, int to, const float *mean, const float *invstd, float keep,
              float *sum, float *product) const {
        for (int g = 0; g < Cp; g += V) {
            const float *at = p.group(g);
            const vec middle = get(mean + g);
            vec total[2] = {}, weighted[2] = {};
            fetch(grad + int64_t(to) * C, int64_t(to - from) * C, g, Cp);
            each(C, n, g, from, to, [&](int64_t i, auto lanes, auto parity) {
                const vec up = lanes.load(grad + g, i);
                total[parity.value] += up, weighted[parity.value] += up * (p.load(at, i, lanes) - middle);
            });
            set(sum + g, (from ? get(sum + g) : vec{}) + keep * (total[0] + total[1]));
            set(product + g, (from ? get(product + g) : vec{}) + keep * (weighted[0] + weighted[1]) * get(invstd + g));
        }
    }

    int backward() const {
        const int chunks = s.batch < CHUNKS ? s.batch : CHUNKS;
        const bool again = stored && !s.kept && !s.normal; // p is computed
        const bool needed = s.training || s.grad_gamma || s.grad_beta || s.grad_scale; // the sums over the batch
        const size_t part = taps_size() + square(), gradients = stored ? size_t(band) * Cp : 0;
        const size_t strip = deep ? (rows * stride + pad) * size_t(W) * V : 0;
        const size_t mine = own_size() + padded(bordered) + padded(halfway()) + padded(gradients) + padded(strip);
        const size_t all = again ? padded(s.batch * pixels) : 0;
        if (!arena.reserve(2 * part + 6 * padded(Cp) + padded(size_t(s.batch) * 2 * Cp) + chunks * part + all +
                           s.threads * mine))
            return 1;
        const Weights weights = pack(true);
        float *a = arena.zeros(Cp), *b = arena.zeros(Cp), *mean = arena.zeros(Cp), *invstd = arena.zeros(Cp);
        float *slope = arena.zeros(Cp), *shift = arena.zeros(Cp); // gradient of p = a up + slope (p - mean) + shift
        float *parts = arena.take(size_t(s.batch) * 2 * Cp), *partial = arena.zeros(chunks * part);
        float *projected = arena.take(all), *owned = arena.take(s.threads * mine);
        if (s.kept) projected = s.kept;
        for (int c = 0; c < C; c++)
            mean[c] = s.normal ? 0 : s.statistics[c], invstd[c] = s.normal ? 1 : s.statistics[C + c];
        affine(a, b);
        const auto source = [&](int i) {
            return s.normal ? Source{s.normal + size_t(i) * n * C, 0}
                   : stored ? Source{projected + i * pixels, plane} : Source{s.x + i * input, 0};
        };

#pragma omp parallel num_threads(s.threads)
        {
            Scratch scratch{owned + omp_get_thread_num() * mine};
            const Own own = take(scratch);
            float *grad_border = scratch.zeros(bordered), *grad_between = scratch.take(halfway());
            float *grad_p = scratch.take(gradients), *result = scratch.take(strip);
            const Share images(needed || again ? s.batch : 0);
            for (int i = images.first; i < images.last; i++) {
                float *both = parts + size_t(i) * 2 * Cp;
                const auto add = [&](Source p, int from, int to) {
                    sums(s.grad + size_t(i) * n * C, p, from, to, mean, invstd, keep(i), both, both + Cp);
                };
                if (again) project(s.x + i * input, weights, own, projected + i * pixels, add);
                else steps([&](int from, int to) { add(source(i), from, to); });
            }
#pragma omp barrier
#pragma omp single
            if (needed) combine(parts, a, invstd, slope, shift);
            const Share share(chunks);
            for (int chunk = share.last; chunk-- > share.first;)
                for (int i = (chunk + 1) * s.batch / chunks; i-- > chunk * s.batch / chunks;) {
                    const float *image = s.x + i * input, *grad = s.grad + size_t(i) * n * C;
                    const Source p = source(i);
                    float *grad_x = s.grad_x + i * input, *taps = partial + chunk * part, *matrix = taps + taps_size();
                    const auto pass = [&](int from, int to) {
                        gradient(grad, p, from, to, a, mean, slope, shift, keep(i), grad_p, grad_x);
                    };
                    if (grid > 1 && !s.accumulate) memset(grad_x, 0, 4 * input);
                    if (conv)
                        bands([&](const Band &b) {
                            const int count = (b.last - b.first) * w;
                            deepen(b, image, weights, own);
                            pass(b.first * w, b.last * w);
                            outer(grad_p, own.d, matrix, count);
                            multiply_back(grad_p, weights.transposed, own.d, count); // d's gradient in its place
                            shallow(b, image, weights, own, taps, grad_border, result, grad_x);
                        });
                    else if (!pool) steps(pass);
                    else {
                        pass(0, n);
                        for (int g = 0; g < Dp; g += V) {
                            enclose(g, 0, H, image, inside(own.border), line);
                            pooling_back(own.border, p.group(g), grad_p + size_t(g) * band, own.between, grad_between,
                                         grad_border);
                            extract(g, 0, H, inside(grad_border), line, image, grad_x);
                        }
                    }
                }
#pragma omp barrier
            if (conv) collect(partial, chunks, part);
        }
        return 0;
    }
    // From the gradient of d of a band to those of the depthwise weights and of x.
    void shallow(const Band &b, const float *image, const Weights &weights, const Own &own, float *taps,
                 float *grad_border, float *result, float *grad_x) const {
        const size_t row = size_t(W) * V;
        const float *border = own.border;
        for (int g = 0; g < Dp; g += V, border += frame, grad_border += frame) {
            float *at = own.d + size_t(g) * band; // d's gradient
            if (deep) {
                correlate(border + b.first * stride * line, at, taps + g * kk, b.last - b.first);
                // x's gradient: a plain convolution of d's, spread over the strides, with turned taps
                spread(b, at, grad_border);
                filter(grad_border + b.done * line, weights.turned + g * kk, result, b.complete - b.done, W, 1);
                extract(g, b.done, b.complete, result, row, image, grad_x);
            } else if (halves) {
                each_half(b, g, grad_border, own.d, [](float *to, const float *from) { set(to, get(from)); });
                extract(g, b.done, b.complete, grad_border + b.done * line, line, image, grad_x);
            } else extract(g, b.done, b.complete, at, row, image, grad_x);
        }
    }

    // The sums over the images (B, 2, Cp): gradients of gamma, beta and scale, and what the statistics pass on.
    void combine(const float *parts, const float *a, const float *invstd, float *slope, float *shift) const {
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
            slope[c] = float(-a[c] * invstd[c] * product / count), shift[c] = float(-a[c] * sum / count);
        }
        if (s.grad_scale) *s.grad_scale = float(products);
    }

    // The gradient of p of the pixels from first to last of an image, into grad_p or, where p is x, into x's.
    void gradient(const float *grad, Source p, int first, int last, const float *a, const float *mean,
                  const float *slope, const float *shift, float keep, float *grad_p, float *grad_x) const {
        const bool add = s.accumulate;
        for (int g = 0; g < Cp; g += V, grad_p += band * V) {
            const float *at = p.group(g);
            const vec times = keep * get(a + g), steep = get(slope + g), fixed = get(shift + g) - steep * get(mean + g);
            fetch(grad + int64_t(last) * C, int64_t(last - first) * C, g, Cp);
            each(C, n, g, first, last, [=](int64_t i, auto lanes, auto) {
                const vec v = times * lanes.load(grad + g, i) + (steep * p.load(at, i, lanes) + fixed);
                if (stored) set(grad_p + (i - first) * V, v);
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

template <typename Call> int64_t with_width(const Part &part, Call call) {
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

// Floats of Part::kept.
int64_t kept_floats(const Part *part) {
    return with_width(*part, [](const auto &it) -> int64_t { return it.stored ? it.s.batch * it.pixels : 0; });
}

int vector_width() { return WIDEST; }

}
