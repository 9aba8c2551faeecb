// Depthwise convolutions of a group: forward, and the gradient of the taps.

struct Taps : Shape {
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

    void filter(const float *x, const float *taps, float *y, int rows, int columns, int step) const {
        with_taps(k, step, dilation, [&](auto K, auto S, auto E) {
            filter_of<K.value, S.value, E.value>(x, taps, y, rows, columns);
        });
    }
    void correlate(const float *x, const float *up, float *sums, int rows) const {
        with_taps(k, stride, dilation,
                  [&](auto K, auto S, auto E) { correlate_of<K.value, S.value, E.value>(x, up, sums, rows); });
    }
};
