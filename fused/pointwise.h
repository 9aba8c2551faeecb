// Pointwise convolutions: products of a band's pixels with the weights, forward and back.

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

struct Pointwise : Shape {
    // Of a band: p (Cp) of every pixel from d, the gradient of d from that of p, and matrix (M, Cp) += sum over the
    // pixels of grad_p d. With HALVES a half of d and its half of p are worked on apart; a group of p may be of both.
    void multiply(const float *d, const float *matrix, float *p, int count) const {
        const auto part = [&](int from, int stop, int first, int last) {
            if (first < last)
                Product{d + size_t(from) * band, size_t(band) * V, matrix + (size_t(from) * Cp + first * V), size_t(Cp),
                        V, p + first * plane, V, plane, stop}.all<V, 1, false>(count, last - first);
        };
        const int even = C / 2 / V, odd = (C / 2 + V - 1) / V;
        if (!halves) return part(0, D, 0, Cp / V);
        part(0, Dp, 0, even), part(0, M, even, odd), part(Dp, Dp, odd, Cp / V);
    }
    void multiply_back(const float *grad_p, const float *transposed, float *grad_d, int count) const {
        const size_t plane = size_t(band) * V;
        const auto part = [&](int from, int to, int first, int groups) {
            Product{grad_p + from / V * plane, plane, transposed + (size_t(from) * M + first * V), size_t(M), V,
                    grad_d + first * plane, V, plane, to - from}.all<V, 1, false>(count, groups);
        };
        if (!halves) return part(0, C, 0, Dp / V);
        part(0, C / 2, 0, Dp / V), part(C / 2 / V * V, C, Dp / V, Dp / V);
    }
    void outer(const float *grad_p, const float *d, float *matrix, int count) const {
        const size_t plane = size_t(band) * V;
        for (int c = 0; c < Cp; c += V) {
            const int left = halves && c >= C / 2 ? Dp : 0, right = halves && c + V <= C / 2 ? Dp : M;
            Product{grad_p + c / V * plane, 0, d + left / V * plane, V, plane, matrix + (c * size_t(M) + left),
                    size_t(M), V, count}.all<1, V, true>(C - c < V ? up(C - c, 4) : V, (right - left) / V);
        }
    }
};
