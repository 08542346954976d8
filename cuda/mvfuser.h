// The launchers of mvfuser.cu and their arguments. M = B L tokens, h channels in either half; every one makes one launch.
// Types are numbers: 0 fp32, 1 bf16, 2 fp16.
#pragma once

#include "device.cuh"

struct MvfuserCastPiece {
    const void* source;
    void* target;
    long long rows, columns, source_stride, target_stride;  // strides of rows, in elements
    long long blocks;                                       // set by the launcher: of this piece and those before it
    float factor;
    int source_type, target_type;
    int exponential;  // factor * exp(value), else factor * value
    int vectors;      // set by the launcher: whether all is aligned to vectors
};

struct MvfuserCastParams {
    MvfuserCastPiece piece[8];
    int pieces;
};

struct MvfuserConvParams {
    const void* xz;         // (B, L, 2h), channels adjacent
    const float *wx, *wz;   // (h, 3)
    void *x, *z;            // (B, L, h): forward's results
    const void *du, *dx;    // (B, L, h): two addends of x's gradient
    const void* dz;         // (B, L, h)
    void* dxz;              // (B, L, 2h)
    float* partial;         // (B * chunks, 2h, 3): sums over a chunk's tokens for the gradients of wx, wz
    long long batch_stride, token_stride;  // of xz, in elements
    int batch, length, half, block_tokens;  // chunks = ceil(L / block_tokens)
    int gate;               // whether z passes SiLU
    int type;
};

struct MvfuserNormParams {
    const void *y, *z;     // (M, h)
    const float* weight;   // (h,)
    const float* scale;    // one number
    void* g;               // (M, h)
    const void* dg;        // (M, h): without the scale, see below
    void *dy, *dz;         // (M, h)
    float* partial;        // (blocks, h + 1): sums over a block's tokens for the gradients of weight, scale
    long long tokens;
    int half, blocks;      // blocks: of the backward
    float eps;
    int type;
};

struct MvfuserSumPiece {
    const float* source;  // (rows, columns)
    const float* times;   // (columns,), or none
    float* target;        // (columns,)
    long long stride;     // of rows, in elements
    int rows, columns;
    float factor;
    int blocks;  // set by the launcher: of this piece and those before it
};

struct MvfuserSumParams {
    MvfuserSumPiece piece[8];
    int pieces;
};

extern "C" MFUSER_VISIBLE int mfuser_mvfuser_cast(const MvfuserCastParams*, void* stream);
extern "C" MFUSER_VISIBLE int mfuser_mvfuser_conv_fwd(const MvfuserConvParams*, void* stream);
extern "C" MFUSER_VISIBLE int mfuser_mvfuser_conv_bwd(const MvfuserConvParams*, void* stream);
extern "C" MFUSER_VISIBLE int mfuser_mvfuser_norm_fwd(const MvfuserNormParams*, void* stream);
extern "C" MFUSER_VISIBLE int mfuser_mvfuser_norm_bwd(const MvfuserNormParams*, void* stream);
extern "C" MFUSER_VISIBLE int mfuser_mvfuser_sum(const MvfuserSumParams*, void* stream);
