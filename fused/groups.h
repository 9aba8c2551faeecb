// Between an image and its groups of V channels, which convolutions and pools want in a border.

struct Groups : Shape {
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

    // What lies around an image: zeros, or what no maximum can be.
    void clear(float *border) const {
        for (size_t i = 0; i < bordered; i++) border[i] = s.kind == MAX ? -INFINITY : 0;
    }
};
