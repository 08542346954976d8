// The arguments of the selective scan's launchers, mfuser_selective_scan_{fwd,bwd}_{fp32,bf16,fp16}.
#pragma once

#include <cstdint>

struct ScanParams {
    // activations: channels (or states) are contiguous and a multiple of four; rows begin at a multiple of four elements
    const void *u, *delta, *B, *C, *z;
    const float *A, *D, *bias, *initial;  // contiguous
    int64_t u_batch, delta_batch, B_batch, C_batch, z_batch, dy_batch;  // strides in elements
    int u_row, delta_row, B_row, C_row, z_row, dy_row;                   // in bytes: a tile of rows stays below 2^31
    void* y;            // (B, L, D), contiguous as all that follows
    float* state;       // (B, D, N): the final state
    float* saved;       // (B, ceil(L / kSub), D, N), or null: not kept
    float *end, *total; // (B, chunks, D, N), (B, chunks, D): the first pass's summaries
    // backward
    const void* dy;
    const float* dstate;                          // (B, D, N) or null
    void *du, *ddelta, *dz, *dB, *dC;             // as their inputs, contiguous
    float *dA, *dD, *dbias, *dinitial;
    float *part_B, *part_C;                       // (channel blocks, B, L, N)
    float *part_A, *part_D, *part_bias;           // (B * chunks, D, N), (B * chunks, D)
    int batch, length, dim, state_size;
    int chunks, chunk;  // chunk: steps in one, a multiple of sub
    int sub;            // steps between kept states, as the caller believes
    int softplus;
};
