// Max and average pooling of a group in its border: forward and back.

struct Pooling : Shape {
    // Pooling goes along one axis of a group, then along the other: taps are `step` floats apart, pixels x, rows y.
    struct Axis {
        int rows, columns;
        size_t y, x, step;
    };
    Axis across() const { return {Hp, w, size_t(Wp) * V, size_t(stride) * V, V}; }
    Axis down() const { return {h, w, size_t(stride) * w * V, V, size_t(w) * V}; }
    size_t halfway() const { return pool ? size_t(Hp) * w * V : 0; } // floats of a group after the first axis

    void pool_axis(Axis axis, const float *x, float *y) const {
        with_side(k, [&](auto K) {
            s.kind == MEAN ? pool_of<K.value, true>(axis, x, y) : pool_of<K.value, false>(axis, x, y);
        });
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
    void forward(const float *x, float *between, float *p) const {
        pool_axis(across(), x, between);
        pool_axis(down(), between, p);
        if (s.kind == MEAN) average(p);
    }
    // grad_p is divided in place for MEAN
    void backward(const float *x, const float *p, float *grad_p, float *between, float *grad_between,
                      float *grad) const {
        memset(grad, 0, 4 * frame), memset(grad_between, 0, 4 * halfway());
        if (s.kind == MEAN) average(grad_p);
        else pool_axis(across(), x, between);
        pool_axis_back(down(), between, p, grad_p, grad_between);
        pool_axis_back(across(), x, between, grad_between, grad);
    }
};
