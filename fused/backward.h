// From the gradient of the output to those of x and of the weights.

struct Backward : Shape {
    const Projection projection{*this};
    const Norm norm{*this};
    const Groups &groups = projection.groups;
    const Taps &taps = projection.taps;
    const Pointwise &pointwise = projection.pointwise;
    const Pooling &pooling = projection.pooling;

    explicit Backward(const Shape &shape) : Shape(shape) {}
    Backward(const Backward &) = delete; // its references are to itself

    // For all images: y = a p + ..., and the gradient of p = a up + slope (p - mean) + shift; each (Cp).
    struct Batch {
        Projection::Weights weights;
        float *a, *b, *mean, *invstd, *slope, *shift;
    };
    // What a thread needs: that of the projection; gradients of x in its border, of what pooling has halfway, of p of
    // a band; a strip of x's gradient.
    struct Own {
        Projection::Own x;
        float *border, *between, *p, *strip;
    };
    size_t gradients() const { return stored ? size_t(band) * Cp : 0; }
    size_t strip() const { return deep ? (rows * stride + pad) * size_t(W) * V : 0; }
    size_t own_size() const {
        return projection.own_size() + padded(bordered) + padded(pooling.halfway()) + padded(gradients()) +
               padded(strip());
    }
    Own take(Scratch &from) const {
        const auto x = projection.take(from);
        float *border = from.zeros(bordered), *between = from.take(pooling.halfway());
        float *p = from.take(gradients());
        return {x, border, between, p, from.take(strip())};
    }

    // 1 where memory is lacking, else 0
    int run() const {
        const int chunks = s.batch < CHUNKS ? s.batch : CHUNKS;
        const bool again = stored && !s.kept && !s.normal; // p is computed
        const bool needed = s.training || s.grad_gamma || s.grad_beta || s.grad_scale; // the sums over the batch
        const size_t chunk_size = taps_size() + square(), mine = own_size(), all = again ? padded(s.batch * pixels) : 0;
        if (!arena.reserve(2 * chunk_size + 6 * padded(Cp) + padded(size_t(s.batch) * 2 * Cp) + chunks * chunk_size +
                           all + s.threads * mine))
            return 1;
        const Batch batch{projection.pack(true), arena.zeros(Cp), arena.zeros(Cp), arena.zeros(Cp),
                          arena.zeros(Cp),       arena.zeros(Cp), arena.zeros(Cp)};
        float *parts = arena.take(size_t(s.batch) * 2 * Cp), *partial = arena.zeros(chunks * chunk_size);
        float *projected = arena.take(all), *owned = arena.take(s.threads * mine);
        if (s.kept) projected = s.kept;
        for (int c = 0; c < C; c++) {
            batch.mean[c] = s.normal ? 0 : s.statistics[c];
            batch.invstd[c] = s.normal ? 1 : s.statistics[C + c];
        }
        norm.affine(batch.a, batch.b);
        const auto source = [&](int i) {
            return s.normal ? Source{s.normal + size_t(i) * n * C, 0}
                   : stored ? Source{projected + i * pixels, plane} : Source{s.x + i * input, 0};
        };

#pragma omp parallel num_threads(s.threads)
        {
            Scratch scratch{owned + omp_get_thread_num() * mine};
            const Own own = take(scratch);
            const Share images(needed || again ? s.batch : 0);
            for (int i = images.first; i < images.last; i++) {
                float *both = parts + size_t(i) * 2 * Cp;
                const auto add = [&](Source p, int from, int to) {
                    norm.sums(s.grad + size_t(i) * n * C, p, from, to, batch.mean, batch.invstd, norm.keep(i), both,
                              both + Cp);
                };
                if (again) projection.image(s.x + i * input, batch.weights, own.x, projected + i * pixels, add);
                else steps([&](int from, int to) { add(source(i), from, to); });
            }
#pragma omp barrier
#pragma omp single
            if (needed) norm.combine(parts, batch.a, batch.invstd, batch.slope, batch.shift);
            const Share share(chunks);
            for (int chunk = share.last; chunk-- > share.first;)
                for (int i = (chunk + 1) * s.batch / chunks; i-- > chunk * s.batch / chunks;)
                    image(i, source(i), batch, own, partial + chunk * chunk_size);
#pragma omp barrier
            if (conv) collect(partial, chunks, chunk_size);
        }
        return 0;
    }

    // The gradient of x of an image; those of the weights are added to the sums of its chunk.
    void image(int i, Source p, const Batch &batch, const Own &own, float *chunk) const {
        const float *x = s.x + i * input, *grad = s.grad + size_t(i) * n * C;
        float *grad_x = s.grad_x + i * input;
        const auto pass = [&](int from, int to) {
            norm.gradient(grad, p, from, to, batch.a, batch.mean, batch.slope, batch.shift, norm.keep(i), own.p,
                          grad_x);
        };
        if (grid > 1 && !s.accumulate) memset(grad_x, 0, 4 * input);
        if (conv)
            return bands([&](const Band &b) {
                const int count = (b.last - b.first) * w;
                projection.deepen(b, x, batch.weights, own.x);
                pass(b.first * w, b.last * w);
                pointwise.outer(own.p, own.x.d, chunk + taps_size(), count);
                pointwise.multiply_back(own.p, batch.weights.transposed, own.x.d, count); // d's gradient in its place
                shallow(b, x, batch.weights, own, chunk, grad_x);
            });
        if (!pool) return steps(pass);
        pass(0, n);
        for (int g = 0; g < Dp; g += V) {
            groups.enclose(g, 0, H, x, groups.inside(own.x.border), line);
            pooling.backward(own.x.border, p.group(g), own.p + size_t(g) * band, own.x.between, own.between,
                             own.border);
            groups.extract(g, 0, H, groups.inside(own.border), line, x, grad_x);
        }
    }

    // From the gradient of d of a band to those of the depthwise weights and of x.
    void shallow(const Band &b, const float *x, const Projection::Weights &weights, const Own &own, float *grad_taps,
                 float *grad_x) const {
        const size_t row = size_t(W) * V;
        const float *border = own.x.border;
        float *grad_border = own.border;
        for (int g = 0; g < Dp; g += V, border += frame, grad_border += frame) {
            float *at = own.x.d + size_t(g) * band; // d's gradient
            if (deep) {
                taps.correlate(border + b.first * stride * line, at, grad_taps + g * kk, b.last - b.first);
                // x's gradient: a plain convolution of d's, spread over the strides, with turned taps
                groups.spread(b, at, grad_border);
                taps.filter(grad_border + b.done * line, weights.turned + g * kk, own.strip, b.complete - b.done, W, 1);
                groups.extract(g, b.done, b.complete, own.strip, row, x, grad_x);
            } else if (halves) {
                groups.each_half(b, g, grad_border, own.x.d, [](float *to, const float *from) { set(to, get(from)); });
                groups.extract(g, b.done, b.complete, grad_border + b.done * line, line, x, grad_x);
            } else groups.extract(g, b.done, b.complete, at, row, x, grad_x);
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
