// Batch norm, scale, drop path and the sum of a node: forward and back.

struct Norm : Shape {
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
};
