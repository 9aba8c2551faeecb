// What a kernel is asked to do, and the processor that it runs on.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

struct Part { // as operation.py fills it
    int64_t batch, height, width, inputs, channels; // of x; channels of p
    int64_t kind, kernel, stride, dilation, relu;   // a Kind; ReLU before a convolution
    int64_t training, accumulate, threads;          // training: with the statistics of the batch, not the running ones
    double momentum, eps;
    const float *x, *depthwise, *pointwise;         // (B, H, W, inputs), (inputs, k, k), (channels, inputs)
    const float *gamma, *beta, *scale, *keep;       // (channels), (channels), (), (batch); each may be missing
    float *running_mean, *running_var;              // (channels); missing: there is no batch norm
    int64_t *tracked;
    float *statistics;                              // mean and 1 / std (2, channels), written forward, read backward
    float *out;                                     // (B, h, w, channels)
    float *kept;                                    // p as forward leaves it to backward, kept_floats(); may be missing
    const float *normal;                            // p normalised, like out; missing backward: p is kept or made again
    const float *grad;                              // of out; the rest is written backward
    float *grad_x; // added to if accumulate
    float *grad_depthwise, *grad_pointwise, *grad_gamma, *grad_beta, *grad_scale;
};

enum Kind { NOTHING, CONV, MAX, MEAN, HALVES };

#if defined(__AVX512F__)
constexpr int WIDEST = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int WIDEST = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int WIDEST = 4, REGISTERS = 32;
#else
constexpr int WIDEST = 4, REGISTERS = 16;
#endif
constexpr int PIXELS = 64; // of a band, about
constexpr int CHUNKS = 16; // partial sums of the weight gradients

// Keeps GCC from loading a value again at each of its uses.
#if defined(__x86_64__)
#define IN_REGISTER(value) __asm__("" : "+v"(value))
#else
#define IN_REGISTER(value)
#endif
