// V floats at a time, and images (pixels, channels) read and written by them.

typedef float vec __attribute__((vector_size(4 * V)));
typedef float loose __attribute__((vector_size(4 * V), aligned(4))); // may lie anywhere
typedef int32_t mask __attribute__((vector_size(4 * V)));

inline vec get(const float *at) { return *reinterpret_cast<const loose *>(at); }
inline void set(float *at, vec v) { *reinterpret_cast<loose *>(at) = v; }
inline vec positive(vec v) { return v <= vec{} ? vec{} : v; } // keeps NaN

// A number that the compiler knows; call(side) with such a side of a window.
template <int I> struct Int {
    static constexpr int value = I;
};
template <typename Call> void with_side(int k, Call call) {
    k == 3 ? call(Int<3>()) : k == 5 ? call(Int<5>()) : call(Int<7>());
}

// V channels of a pixel of an image that is not padded: all of them are its own; or some are the next pixel's;
// or the image ends.
struct Whole {
    int64_t row; // floats a pixel
    vec load(const float *image, int64_t i) const { return get(image + i * row); }
    void store(float *image, int64_t i, vec v) const { set(image + i * row, v); }
};
struct Shared {
    int64_t row;
    mask own;
    vec load(const float *image, int64_t i) const { return (vec)((mask)get(image + i * row) & own); }
    void store(float *image, int64_t i, vec v) const { set(image + i * row, own ? v : get(image + i * row)); }
};
struct Last {
    int64_t row, rest;
    vec load(const float *image, int64_t i) const {
        vec v = {};
        memcpy(&v, image + i * row, 4 * rest);
        return v;
    }
    void store(float *image, int64_t i, vec v) const { memcpy(image + i * row, &v, 4 * rest); }
};

template <typename Lanes, typename Body> inline void pairs(int64_t i, int64_t last, Lanes lanes, Body &body) {
    for (; i + 2 <= last; i += 2) body(i, lanes, Int<0>()), body(i + 1, lanes, Int<1>());
    if (i < last) body(i, lanes, Int<0>());
}

// body(pixel, lanes, parity) for the pixels from first to last of `count`, at their channels from g on
template <typename Body>
inline void each(int channels, int64_t count, int g, int64_t first, int64_t last, Body body) {
    const int64_t rest = channels - g;
    if (rest >= V) return pairs(first, last, Whole{channels}, body);
    mask own = {};
    for (int j = 0; j < rest; j++) own[j] = -1;
    const int64_t spare = count * channels - g - V; // what is left after V floats of the first pixel
    int64_t whole = spare < 0 ? 0 : spare / channels + 1;
    whole = whole < first ? first : whole < last ? whole : last;
    pairs(first, whole, Shared{channels, own}, body);
    pairs(whole, last, Last{channels, rest}, body);
}

// Asks for floats that are needed next: those that are the group g's of all channels.
inline void fetch(const float *next, int64_t count, int g, int channels) {
    const int64_t last = count * (g + V) / channels;
    for (int64_t i = count * g / channels; i < last; i += 16) __builtin_prefetch(next + i, 0, 2);
}
