// The operations of a cell as fused kernels for the CPU: see operation.py for what and why.
//
// Images are (H, W, C), float32. An operation is one of four ways from the input to p,
//   CONV   (ReLU,) depthwise k x k with stride and dilation -> d, pointwise C x C -> p
//   MAX    max pooling k x k with a stride
//   MEAN   average pooling k x k with a stride, the padding not counted
//   NOTHING
// then batch norm, y = a p + b with a = gamma / std and b = beta - a mean, and out = y, out = max(y, 0) or out += y.
//
// Each image is worked on as a whole, in the cache of one core. Inside, channels are padded to vectors of V floats.
// Sums over the batch are taken per image or per chunk of images and added in a fixed order, so that no result
// depends on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

struct Shape {  // as operation.py fills it
    int32_t batch, height, width, channels;      // of the input
    int32_t kind, kernel, stride, dilation;      // a Kind; kernel 1 with NOTHING
    int32_t training, relu, accumulate, threads; // training: with the statistics of the batch, not the running ones
    int32_t relu_first, scalar;                  // of CONV; gamma is one number for all channels
    float momentum, eps;
};

namespace {

enum Kind { NOTHING, CONV, MAX, MEAN };

constexpr int BLOCK = 8;   // pixels that share a load of weights in matmul
constexpr int CHUNKS = 16; // partial sums of the weight gradients

constexpr size_t padded(size_t floats) { return (floats + 15) / 16 * 16; }

// Scratch memory of a calling thread: it grows, and stays for the next call.
struct Arena {
    float *start = nullptr;
    size_t size = 0, used = 0;

    bool reserve(size_t floats) {
        used = 0;
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
        return part;
    }
    ~Arena() { free(start); }
};

thread_local Arena arena;

typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec16 __attribute__((vector_size(64), aligned(4), may_alias));

template <typename vec> struct Operation {
    static constexpr int V = sizeof(vec) / 4;

    const Shape s;
    const int C, groups, Cp;         // channels, vectors, padded channels
    const int k, kk, stride, dilation, pad;
    const int H, W, Hp, Wp;          // input, and with its border of zeros
    const int h, w, n, np;           // output; its pixels; the same in whole blocks
    const bool conv, pool, stored;   // stored: p is not the input itself
    const size_t pixels, bordered, input;

    explicit Operation(const Shape &shape)
        : s(shape), C(s.channels), groups((C + V - 1) / V), Cp(groups * V), k(s.kernel), kk(k * k), stride(s.stride),
          dilation(s.dilation), pad(dilation * (k / 2)), H(s.height), W(s.width), Hp(H + 2 * pad), Wp(W + 2 * pad),
          h((H + stride - 1) / stride), w((W + stride - 1) / stride), n(h * w), np((n + BLOCK - 1) / BLOCK * BLOCK),
          conv(s.kind == CONV), pool(s.kind == MAX || s.kind == MEAN), stored(conv || pool || C != Cp),
          pixels(size_t(np) * Cp), bordered(size_t(Hp) * Wp * Cp), input(size_t(H) * W) {}

    static vec get(const float *at) { return *reinterpret_cast<const vec *>(at); }
    static void set(float *at, vec v) { *reinterpret_cast<vec *>(at) = v; }

    // A vector of a pixel of C floats, zero beyond the last channel; g is a multiple of V.
    vec get_channels(const float *pixel, int g) const {
        if (C == Cp) return get(pixel + g);
        vec v = {};
        memcpy(&v, pixel + g, 4 * (C - g < V ? C - g : V));
        return v;
    }
    void set_channels(float *pixel, int g, vec v) const {
        if (C == Cp) return set(pixel + g, v);
        memcpy(pixel + g, &v, 4 * (C - g < V ? C - g : V));
    }

    // The middle of a border: its first pixel.
    template <typename Float> Float *inside(Float *border) const { return border + (size_t(pad) * Wp + pad) * Cp; }

    // The input image into the middle of its border.
    void enclose(const float *from, float *border) const {
        const vec zero = {};
        for (int y = 0; y < H; y++) {
            float *to = inside(border) + size_t(y) * Wp * Cp;
            for (int x = 0; x < W; x++, from += C, to += Cp)
                for (int g = 0; g < Cp; g += V) {
                    const vec v = get_channels(from, g);
                    set(to + g, s.relu_first ? (v <= zero ? zero : v) : v); // keeps NaN
                }
        }
    }

    // The middle of a border into the gradient of the input image, cut off where the ReLU did.
    void extract(const float *border, const float *image, float *to) const {
        const vec zero = {};
        for (int y = 0; y < H; y++) {
            const float *from = inside(border) + size_t(y) * Wp * Cp;
            for (int x = 0; x < W; x++, from += Cp, image += C, to += C)
                for (int g = 0; g < Cp; g += V) {
                    const vec v = get(from + g);
                    set_channels(to, g, s.relu_first ? (get_channels(image, g) <= zero ? zero : v) : v);
                }
        }
    }

    // Pixels of the output (h, w) to every stride-th pixel of the middle of a border.
    void spread(const float *from, float *border) const {
        for (int y = 0; y < h; y++) {
            float *to = inside(border) + size_t(y) * stride * Wp * Cp;
            for (int x = 0; x < w; x++, to += stride * Cp)
                for (int g = 0; g < Cp; g += V, from += V) set(to + g, get(from));
        }
    }

    // N neighbouring pixels of y = sum over taps of x * taps
    template <int K, int N>
    static void taps_of(const float *x, const vec *taps, float *y, size_t row, size_t column, size_t next, int Cp) {
        vec sum[N] = {};
#pragma GCC unroll 7
        for (int i = 0; i < K; i++)
#pragma GCC unroll 7
            for (int j = 0; j < K; j++)
#pragma GCC unroll 4
                for (int m = 0; m < N; m++) sum[m] += taps[i * K + j] * get(x + i * row + j * column + m * next);
#pragma GCC unroll 4
        for (int m = 0; m < N; m++) set(y + m * Cp, sum[m]);
    }

    // y (rows, columns), `leap` pixels a row, from x with its border
    template <int K>
    void depthwise_k(const float *x, const float *weights, float *y, int rows, int columns, int leap, int step) const {
        const size_t row = size_t(dilation) * Wp * Cp, column = size_t(dilation) * Cp, next = size_t(step) * Cp;
        for (int g = 0; g < Cp; g += V) {
            vec taps[K * K];
#pragma GCC unroll 49
            for (int t = 0; t < K * K; t++) taps[t] = get(weights + t * Cp + g);
            for (int r = 0; r < rows; r++) {
                const float *from = x + size_t(r) * step * Wp * Cp + g;
                float *to = y + size_t(r) * leap * Cp + g;
                int c = 0;
                for (; c + 4 <= columns; c += 4, from += 4 * next, to += 4 * Cp)
                    taps_of<K, 4>(from, taps, to, row, column, next, Cp);
                for (; c < columns; c++, from += next, to += Cp) taps_of<K, 1>(from, taps, to, row, column, next, Cp);
            }
        }
    }
    void depthwise(const float *x, const float *weights, float *y, int rows, int columns, int leap, int step) const {
        if (k == 3) return depthwise_k<3>(x, weights, y, rows, columns, leap, step);
        if (k == 5) return depthwise_k<5>(x, weights, y, rows, columns, leap, step);
        depthwise_k<7>(x, weights, y, rows, columns, leap, step);
    }

    // sums[tap] += sum over the output's pixels of x at the tap times up; x with its border
    template <int K> void depthwise_weights_k(const float *x, const float *up, float *sums) const {
        const size_t row = size_t(dilation) * Wp * Cp, column = size_t(dilation) * Cp, next = size_t(stride) * Cp;
        for (int g = 0; g < Cp; g += V) {
            vec total[K * K];
#pragma GCC unroll 49
            for (int t = 0; t < K * K; t++) total[t] = get(sums + t * Cp + g);
            for (int r = 0; r < h; r++) {
                const float *at = x + size_t(r) * stride * Wp * Cp + g, *from = up + size_t(r) * w * Cp + g;
                for (int c = 0; c < w; c++, at += next, from += Cp) {
                    const vec v = get(from);
#pragma GCC unroll 7
                    for (int i = 0; i < K; i++)
#pragma GCC unroll 7
                        for (int j = 0; j < K; j++) total[i * K + j] += v * get(at + i * row + j * column);
                }
            }
#pragma GCC unroll 49
            for (int t = 0; t < K * K; t++) set(sums + t * Cp + g, total[t]);
        }
    }
    void depthwise_weights(const float *x, const float *up, float *sums) const {
        if (k == 3) return depthwise_weights_k<3>(x, up, sums);
        if (k == 5) return depthwise_weights_k<5>(x, up, sums);
        depthwise_weights_k<7>(x, up, sums);
    }

    // y (np, Cp) = a (np, C of Cp) @ weights (C, Cp)
    void matmul(const float *a, const float *weights, float *y) const {
        for (int i = 0; i < np; i += BLOCK)
            for (int g = 0; g < Cp; g += V) {
                vec sum[BLOCK] = {};
                const float *from = a + size_t(i) * Cp;
                for (int c = 0; c < C; c++) {
                    const vec line = get(weights + size_t(c) * Cp + g);
#pragma GCC unroll 8
                    for (int j = 0; j < BLOCK; j++) sum[j] += from[size_t(j) * Cp + c] * line;
                }
#pragma GCC unroll 8
                for (int j = 0; j < BLOCK; j++) set(y + size_t(i + j) * Cp + g, sum[j]);
            }
    }

    // sums (Cp, Cp) += a^T (Cp, n) @ b (n, Cp)
    void outer(const float *a, const float *b, float *sums) const {
        constexpr int ROWS = V < 8 ? V : 8;
        for (int r = 0; r < Cp; r += ROWS)
            for (int g = 0; g < Cp; g += V) {
                vec sum[ROWS];
#pragma GCC unroll 8
                for (int j = 0; j < ROWS; j++) sum[j] = get(sums + size_t(r + j) * Cp + g);
                for (int i = 0; i < n; i++) {
                    const vec line = get(b + size_t(i) * Cp + g);
#pragma GCC unroll 8
                    for (int j = 0; j < ROWS; j++) sum[j] += a[size_t(i) * Cp + r + j] * line;
                }
#pragma GCC unroll 8
                for (int j = 0; j < ROWS; j++) set(sums + size_t(r + j) * Cp + g, sum[j]);
            }
    }

    // Pixels of the window of an output pixel that are no padding.
    int inside_window(int row, int column) const {
        const int top = row * stride - pad, left = column * stride - pad;
        const int bottom = top + k < H ? top + k : H, right = left + k < W ? left + k : W;
        return (bottom - (top > 0 ? top : 0)) * (right - (left > 0 ? left : 0));
    }

    // p (h, w) from x with its border, which holds -inf for MAX and 0 for MEAN
    void pooling(const float *x, float *p) const {
        for (int r = 0; r < h; r++)
            for (int c = 0; c < w; c++, p += Cp) {
                const float *from = x + (size_t(r) * Wp + c) * stride * Cp;
                const float count = s.kind == MEAN ? inside_window(r, c) : 1;
                for (int g = 0; g < Cp; g += V) {
                    vec v = s.kind == MEAN ? vec{} : get(from + g);
                    for (int i = 0; i < k; i++)
                        for (int j = 0; j < k; j++) {
                            const vec u = get(from + (size_t(i) * Wp + j) * Cp + g);
                            v = s.kind == MEAN ? v + u : ((u > v) | (u != u)) ? u : v;
                        }
                    set(p + g, v / count);
                }
            }
    }

    // Adds the gradient of p to that of x with its border; that of a maximum goes to the first pixel that has it.
    void pooling_back(const float *x, const float *p, const float *grad_p, float *grad) const {
        for (int r = 0; r < h; r++)
            for (int c = 0; c < w; c++, p += Cp, grad_p += Cp) {
                const size_t start = (size_t(r) * Wp + c) * stride * Cp;
                const float count = s.kind == MEAN ? inside_window(r, c) : 1;
                for (int g = 0; g < Cp; g += V) {
                    const vec zero = {}, top = get(p + g);
                    vec left = get(grad_p + g) / count;
                    for (int i = 0; i < k; i++)
                        for (int j = 0; j < k; j++) {
                            const size_t at = start + (size_t(i) * Wp + j) * Cp + g;
                            if (s.kind == MEAN) {
                                set(grad + at, get(grad + at) + left);
                                continue;
                            }
                            const auto here = get(x + at) == top;
                            set(grad + at, get(grad + at) + (here ? left : zero));
                            left = here ? zero : left;
                        }
                }
            }
    }

    // What lies around an image: zeros, or what no maximum can be.
    void clear(float *border) const {
        for (size_t i = 0; i < bordered; i++) border[i] = s.kind == MAX ? -INFINITY : 0;
    }

    // Weights as the loops above want them: taps (k k, Cp), matrix (in, out); flipped and transposed for gradients.
    struct Weights {
        float *taps, *matrix, *flipped, *transposed;
    };
    size_t weights_size() const { return conv ? 2 * padded(size_t(kk) * Cp) + 2 * padded(size_t(Cp) * Cp) : 0; }

    Weights pack(const float *depthwise, const float *pointwise) const {
        if (!conv) return {};
        const size_t square = size_t(Cp) * Cp;
        Weights p = {arena.take(kk * Cp), arena.take(square), arena.take(kk * Cp), arena.take(square)};
        memset(p.taps, 0, 4 * kk * Cp), memset(p.flipped, 0, 4 * kk * Cp);
        memset(p.matrix, 0, 4 * square), memset(p.transposed, 0, 4 * square);
        for (int c = 0; c < C; c++) {
            for (int t = 0; t < kk; t++)
                p.taps[t * Cp + c] = p.flipped[(kk - 1 - t) * Cp + c] = depthwise[c * kk + t];
            for (int o = 0; o < C; o++) p.matrix[c * Cp + o] = p.transposed[o * Cp + c] = pointwise[o * C + c];
        }
        return p;
    }

    // x of an image -> p (np, Cp). `border` gets x with its border of zeros, d (np, Cp) the depthwise convolution.
    const float *project(const float *x, const Weights &weights, float *border, float *d, float *p) const {
        if (!stored) return x;
        if (!conv && !pool) {
            for (int i = 0; i < n; i++)
                for (int g = 0; g < Cp; g += V) set(p + size_t(i) * Cp + g, get_channels(x + size_t(i) * C, g));
            return p;
        }
        enclose(x, border);
        if (pool) {
            pooling(border, p);
            return p;
        }
        depthwise(border, weights.taps, d, h, w, w, stride);
        matmul(d, weights.matrix, p);
        return p;
    }

    // Mean and sum of squared deviations of an image, each (Cp).
    void moments(const float *p, float *mean, float *squares) const {
        for (int g = 0; g < Cp; g += V) {
            vec even = {}, odd = {};
            int i = 0;
            for (; i + 2 <= n; i += 2) even += get(p + size_t(i) * Cp + g), odd += get(p + size_t(i + 1) * Cp + g);
            if (i < n) even += get(p + size_t(i) * Cp + g);
            const vec middle = (even + odd) / float(n);
            even = odd = vec{};
            for (i = 0; i + 2 <= n; i += 2) {
                const vec u = get(p + size_t(i) * Cp + g) - middle, v = get(p + size_t(i + 1) * Cp + g) - middle;
                even += u * u, odd += v * v;
            }
            if (i < n) {
                const vec u = get(p + size_t(i) * Cp + g) - middle;
                even += u * u;
            }
            set(mean + g, middle), set(squares + g, even + odd);
        }
    }

    // From the moments of every image (B, 2, Cp) to mean and 1 / std of the batch; the running ones follow.
    void statistics(const float *parts, float *mean, float *invstd, float *running_mean, float *running_var) const {
        const double images = s.batch, count = images * n;
        for (int c = 0; c < C; c++) {
            double middle = 0, squares = 0;
            for (int b = 0; b < s.batch; b++) middle += parts[size_t(b) * 2 * Cp + c];
            middle /= images;
            for (int b = 0; b < s.batch; b++) {
                const double gap = parts[size_t(b) * 2 * Cp + c] - middle;
                squares += parts[(size_t(b) * 2 + 1) * Cp + c] + n * gap * gap;
            }
            mean[c] = float(middle), invstd[c] = float(1 / sqrt(squares / count + s.eps));
            running_mean[c] += s.momentum * (float(middle) - running_mean[c]);
            running_var[c] += s.momentum * (float(squares / (count - 1)) - running_var[c]);
        }
    }

    // a and b of y = a p + b, each (Cp), zero in the padding
    void affine(const float *gamma, const float *beta, const float *mean, const float *invstd, float *a, float *b) const {
        memset(a, 0, 4 * Cp), memset(b, 0, 4 * Cp);
        for (int c = 0; c < C; c++) {
            a[c] = (gamma ? gamma[s.scalar ? 0 : c] : 1) * invstd[c];
            b[c] = (beta ? beta[c] : 0) - a[c] * mean[c];
        }
    }

    void finish(const float *p, const float *a, const float *b, float *out) const {
        const vec zero = {};
        for (int i = 0; i < n; i++, p += Cp, out += C)
            for (int g = 0; g < Cp; g += V) {
                vec y = get(a + g) * get(p + g) + get(b + g);
                if (s.relu) y = y <= zero ? zero : y;
                if (s.accumulate) y += get_channels(out, g);
                set_channels(out, g, y);
            }
    }

    int forward(const float *x, const float *depthwise, const float *pointwise, const float *gamma, const float *beta,
                float *mean, float *invstd, float *running_mean, float *running_var, int64_t *tracked, float *out) const {
        const size_t own = conv || pool ? padded(bordered) + padded(pixels) : 0;
        const size_t all = stored ? padded(s.batch * pixels) : 0;
        if (!arena.reserve(weights_size() + 2 * padded(Cp) + padded(size_t(s.batch) * 2 * Cp) + all + s.threads * own))
            return 1;
        const Weights weights = pack(depthwise, pointwise);
        float *a = arena.take(Cp), *b = arena.take(Cp), *parts = arena.take(size_t(s.batch) * 2 * Cp);
        float *projected = arena.take(all), *owned = arena.take(s.threads * own);

#pragma omp parallel num_threads(s.threads)
        {
            float *border = owned + omp_get_thread_num() * own, *d = border + padded(bordered);
            if (own) {
                clear(border);
                memset(d, 0, 4 * pixels); // the pixels that only fill the last block stay zero
            }
#pragma omp for schedule(static)
            for (int i = 0; i < s.batch; i++) {
                const float *p = project(x + i * input * C, weights, border, d, projected + (stored ? i * pixels : 0));
                float *part = parts + size_t(i) * 2 * Cp;
                if (s.training) moments(p, part, part + Cp);
            }
#pragma omp single
            {
                if (s.training) {
                    statistics(parts, mean, invstd, running_mean, running_var);
                    if (s.momentum) ++*tracked;
                }
                affine(gamma, beta, mean, invstd, a, b);
            }
#pragma omp for schedule(static)
            for (int i = 0; i < s.batch; i++)
                finish(stored ? projected + i * pixels : x + i * input * C, a, b, out + size_t(i) * n * C);
        }
        return 0;
    }

    // The gradient of a pixel's y, zero where ReLU cut it off.
    vec upstream(const float *grad, const float *p, const float *a, const float *b, int g) const {
        const vec up = get_channels(grad, g), zero = {};
        return s.relu ? (get(a + g) * get(p + g) + get(b + g) <= zero ? zero : up) : up;
    }

    // Sums over an image of the gradient and of the gradient times normalised p, each (Cp).
    void sums(const float *grad, const float *p, const float *a, const float *b, const float *mean, const float *invstd,
              float *sum, float *product) const {
        for (int g = 0; g < Cp; g += V) {
            vec total = {}, weighted = {};
            for (int i = 0; i < n; i++) {
                const float *at = p + size_t(i) * Cp;
                const vec up = upstream(grad + size_t(i) * C, at, a, b, g);
                total += up, weighted += up * (get(at + g) - get(mean + g));
            }
            set(sum + g, total), set(product + g, weighted * get(invstd + g));
        }
    }

    int backward(const float *x, const float *depthwise, const float *pointwise, const float *gamma, const float *beta,
                 const float *mean, const float *invstd, const float *grad, float *grad_x, float *grad_depthwise,
                 float *grad_pointwise, float *grad_gamma, float *grad_beta) const {
        const int chunks = s.batch < CHUNKS ? s.batch : CHUNKS;
        const size_t square = size_t(Cp) * Cp, part = conv ? padded(kk * Cp) + padded(square) : 0;
        const size_t own = conv || pool ? 2 * padded(bordered) + 2 * padded(pixels) : 0;
        const size_t all = stored ? padded(s.batch * pixels) : 0, all_d = conv ? all : 0;
        if (!arena.reserve(weights_size() + 6 * padded(Cp) + padded(size_t(s.batch) * 2 * Cp) + padded(chunks * part) +
                           all + all_d + s.threads * own))
            return 1;
        const Weights weights = pack(depthwise, pointwise);
        float *a = arena.take(Cp), *b = arena.take(Cp), *centre = arena.take(Cp), *scale = arena.take(Cp);
        float *slope = arena.take(Cp), *shift = arena.take(Cp); // gradient of p = a up + slope (p - mean) + shift
        float *parts = arena.take(size_t(s.batch) * 2 * Cp), *partial = arena.take(chunks * part);
        float *projected = arena.take(all), *filtered = arena.take(all_d), *owned = arena.take(s.threads * own);
        memset(partial, 0, 4 * chunks * part);
        memset(centre, 0, 4 * Cp), memset(scale, 0, 4 * Cp), memset(slope, 0, 4 * Cp), memset(shift, 0, 4 * Cp);
        memcpy(centre, mean, 4 * C), memcpy(scale, invstd, 4 * C);
        affine(gamma, beta, mean, invstd, a, b);
        double products = 0; // over all channels: the gradient of a scalar gamma

#pragma omp parallel num_threads(s.threads)
        {
            float *border = owned + omp_get_thread_num() * own, *grad_border = border + padded(bordered);
            float *grad_p = grad_border + padded(bordered), *grad_d = grad_p + padded(pixels);
            if (own) {
                clear(border);
                memset(grad_border, 0, 4 * (own - padded(bordered)));
            }
#pragma omp for schedule(static)
            for (int i = 0; i < s.batch; i++) {
                const float *p = project(x + i * input * C, weights, border, filtered + (conv ? i * pixels : 0),
                                         projected + (stored ? i * pixels : 0));
                float *both = parts + size_t(i) * 2 * Cp;
                sums(grad + size_t(i) * n * C, p, a, b, centre, scale, both, both + Cp);
            }
#pragma omp single
            for (int c = 0; c < C; c++) {
                double sum = 0, product = 0;
                const double count = double(s.batch) * n;
                for (int i = 0; i < s.batch; i++) {
                    sum += parts[size_t(i) * 2 * Cp + c], product += parts[(size_t(i) * 2 + 1) * Cp + c];
                }
                if (grad_beta) grad_beta[c] = float(sum);
                products += product;
                if (grad_gamma && !s.scalar) grad_gamma[c] = float(product);
                if (!s.training) continue; // the statistics do not depend on x
                slope[c] = float(-a[c] * invstd[c] * product / count), shift[c] = float(-a[c] * sum / count);
            }
#pragma omp for schedule(static)
            for (int chunk = 0; chunk < chunks; chunk++)
                for (int i = chunk * s.batch / chunks; i < (chunk + 1) * s.batch / chunks; i++) {
                    const float *image = x + i * input * C, *p = stored ? projected + i * pixels : image;
                    const float *up = grad + size_t(i) * n * C;
                    for (int pixel = 0; pixel < n; pixel++)
                        for (int g = 0; g < Cp; g += V) {
                            const float *at = p + size_t(pixel) * Cp;
                            const vec v = get(a + g) * upstream(up + size_t(pixel) * C, at, a, b, g) +
                                          get(slope + g) * (get(at + g) - get(centre + g)) + get(shift + g);
                            if (conv || pool)
                                set(grad_p + size_t(pixel) * Cp + g, v);
                            else
                                set_channels(grad_x + (i * input + pixel) * C, g, v);
                        }
                    float *result = grad_x + i * input * C;
                    if (pool) {
                        enclose(image, border);
                        memset(grad_border, 0, 4 * bordered);
                        pooling_back(border, p, grad_p, grad_border);
                        extract(grad_border, image, result);
                    } else if (conv) {
                        float *sum_taps = partial + chunk * part, *sum_matrix = sum_taps + padded(kk * Cp);
                        outer(grad_p, filtered + i * pixels, sum_matrix);
                        matmul(grad_p, weights.transposed, grad_d);
                        enclose(image, border);
                        depthwise_weights(border, grad_d, sum_taps);
                        // x's gradient: a plain convolution of d's, spread over the strides, with turned taps
                        spread(grad_d, grad_border);
                        this->depthwise(grad_border, weights.flipped, inside(border), H, W, Wp, 1);
                        extract(border, image, result);
                    }
                }
        }
        if (grad_gamma && s.scalar) *grad_gamma = float(products);
        if (!conv) return 0;
        for (int c = 0; c < C; c++) {
            for (int t = 0; t < kk; t++) grad_depthwise[c * kk + t] = total(partial + t * Cp + c, chunks, part);
            for (int i = 0; i < C; i++) // (out, in)
                grad_pointwise[c * C + i] = total(partial + padded(kk * Cp) + size_t(c) * Cp + i, chunks, part);
        }
        return 0;
    }

    static float total(const float *first, int chunks, size_t part) {
        double sum = 0;
        for (int chunk = 0; chunk < chunks; chunk++) sum += first[chunk * part];
        return float(sum);
    }
};

template <typename Call> int with_width(int channels, Call call) {
    if (channels <= 4) return call(vec4());
    if (channels <= 8) return call(vec8());
    return call(vec16());
}

} // namespace

extern "C" {

// gamma and beta may be NULL. statistics: mean and 1 / std (2, C), written in training, else read.
// Returns 0, or 1 where memory is lacking.
int operation_forward(const Shape *s, const float *x, const float *depthwise, const float *pointwise,
                      const float *gamma, const float *beta, float *statistics, float *running_mean, float *running_var,
                      int64_t *tracked, float *out) {
    return with_width(s->channels, [&](auto width) {
        return Operation<decltype(width)>(*s).forward(x, depthwise, pointwise, gamma, beta, statistics,
                                                      statistics + s->channels, running_mean, running_var, tracked, out);
    });
}

// Gradients of x, both weights, gamma and beta (unless NULL) from that of y; d and p are computed again from x.
int operation_backward(const Shape *s, const float *x, const float *depthwise, const float *pointwise,
                       const float *gamma, const float *beta, const float *statistics, const float *grad, float *grad_x,
                       float *grad_depthwise, float *grad_pointwise, float *grad_gamma, float *grad_beta) {
    return with_width(s->channels, [&](auto width) {
        return Operation<decltype(width)>(*s).backward(x, depthwise, pointwise, gamma, beta, statistics,
                                                       statistics + s->channels, grad, grad_x, grad_depthwise,
                                                       grad_pointwise, grad_gamma, grad_beta);
    });
}

}
