// The kernels for vectors of V floats. kernels.cpp includes it once for each V, in a namespace of its own, so that the
// files below say vec and not vec<V>; each of them needs those above it.

#include "vectors.h"
#include "shape.h"
#include "groups.h"
#include "taps.h"
#include "pointwise.h"
#include "pooling.h"
#include "norm.h"
#include "project.h"
#include "forward.h"
#include "backward.h"

int forward(const Part &part) { return Forward{Shape(part)}.run(); }
int backward(const Part &part) { return Backward{Shape(part)}.run(); }
int64_t kept_floats(const Part &part) {
    const Shape shape(part);
    return shape.stored ? part.batch * int64_t(shape.pixels) : 0;
}
