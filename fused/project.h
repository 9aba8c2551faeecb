// From x to p, an image at a time: what both directions begin with.

struct Projection : Shape {
    const Groups groups{*this};
    const Taps taps{*this};
    const Pointwise pointwise{*this};
    const Pooling pooling{*this};

    // Weights as the loops want them: taps (groups, k k, V), matrix (M, Cp); turned and transposed for gradients.
    struct Weights {
        float *taps, *matrix, *turned, *transposed;
    };
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

    // What a thread needs to project: x with its border, what pooling has halfway, d of a band.
    struct Own {
        float *border, *between, *d;
    };
    size_t own_size() const { return padded(bordered) + padded(pooling.halfway()) + padded(deeper()); }
    size_t deeper() const { return conv ? size_t(band) * M : 0; }
    Own take(Scratch &from) const {
        const Own own = {from.take(bordered), from.take(pooling.halfway()), from.take(deeper())};
        groups.clear(own.border);
        return own;
    }

    // x of an image -> p; call(p, first pixel, last pixel) for every band of it
    template <typename Call>
    void image(const float *x, const Weights &weights, const Own &own, float *p, Call call) const {
        if (!stored) return steps([&](int from, int to) { call(Source{x, 0}, from, to); });
        if (pool) {
            for (int g = 0; g < Dp; g += V) {
                groups.enclose(g, 0, H, x, groups.inside(own.border), line);
                pooling.forward(own.border, own.between, p + g / V * plane);
            }
            return call(Source{p, plane}, 0, n);
        }
        bands([&](const Band &b) {
            deepen(b, x, weights, own);
            pointwise.multiply(own.d, weights.matrix, p + b.first * w * V, (b.last - b.first) * w);
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
                groups.enclose(g, b.first, b.last, x, at, size_t(W) * V);
                continue;
            }
            groups.enclose(g, b.read, b.known, x, groups.inside(border) + b.read * line, line);
            if (deep)
                taps.filter(border + b.first * stride * line, weights.taps + g * kk, at, b.last - b.first, w, stride);
            else groups.each_half(b, g, border, own.d, [](const float *from, float *to) { set(to, get(from)); });
        }
    }
};
