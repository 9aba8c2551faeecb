// From x to the output.

struct Forward : Shape {
    const Projection projection{*this};
    const Norm norm{*this};

    // 1 where memory is lacking, else 0
    int run() const {
        const size_t all = stored && !s.kept ? padded(s.batch * pixels) : 0, mine = projection.own_size();
        if (!arena.reserve(taps_size() + square() + 2 * padded(Cp) + padded(size_t(s.batch) * 2 * Cp) + all +
                           s.threads * mine))
            return 1;
        const auto weights = projection.pack(false);
        float *a = arena.zeros(Cp), *b = arena.zeros(Cp), *parts = arena.take(size_t(s.batch) * 2 * Cp);
        float *projected = arena.take(all), *owned = arena.take(s.threads * mine);
        if (s.kept) projected = s.kept;

#pragma omp parallel num_threads(s.threads)
        {
            Scratch scratch{owned + omp_get_thread_num() * mine};
            const auto own = projection.take(scratch);
            const Share images(s.batch);
            for (int i = images.first; i < images.last; i++) {
                float *mean = parts + size_t(i) * 2 * Cp;
                projection.image(s.x + i * input, weights, own, projected + i * pixels, [&](Source p, int from, int to) {
                    if (s.training) norm.moments(p, from, to, mean, mean + Cp);
                });
            }
#pragma omp barrier
#pragma omp single
            {
                s.training ? norm.statistics(parts) : norm.given_statistics();
                norm.affine(a, b);
            }
            for (int i = images.last; i-- > images.first;) {
                const Source p = stored ? Source{projected + i * pixels, plane} : Source{s.x + i * input, 0};
                norm.finish(p, a, b, norm.keep(i), s.out + size_t(i) * n * C);
            }
        }
        return 0;
    }
};
