// Where everything of a part lies: sizes, and the way through an image.

struct Shape {
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

    explicit Shape(const Part &part)
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

    // Where d's channels for the channel c of p begin.
    int second(int c) const { return halves && c >= C / 2 ? Dp : 0; }

    // Floats of the weights as the loops want them.
    size_t taps_size() const { return deep ? padded(size_t(kk) * Dp) : 0; }
    size_t square() const { return conv ? padded(size_t(Cp) * M) : 0; }
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
