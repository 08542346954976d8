// What the kernels of MVFuser share. M = B L tokens, h channels in either half.
#pragma once
#include "device.cuh"
#include "mvfuser.h"

namespace {

// V neighbours in memory, aligned to the largest power of 2 that divides their size, and at most to 16 bytes
template <typename T, int V, size_t kBytes = sizeof(T) * V>
struct alignas(kBytes % 16 == 0 ? 16 : kBytes & (~kBytes + 1)) Pack {
    T item[V];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
    return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_if(bool inside, const T* from) {
    if (inside) return load<T, V>(from);
    Pack<T, V> zeros;
#pragma unroll
    for (int i = 0; i < V; ++i) zeros.item[i] = from_float<T>(0.0f);
    return zeros;
}

template <typename T, int V>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& pack) {
    if constexpr (sizeof pack == 16 && sizeof(T) == 2) {
        uint4 words;
        memcpy(&words, &pack, 16);
#ifdef MFUSER_ON_CPU
        *reinterpret_cast<uint4*>(to) = words;
#else
        __stwb(reinterpret_cast<uint4*>(to), words);  // an assignment becomes stores of 2 and 4 bytes in norm_backward
#endif
    } else {
        *reinterpret_cast<Pack<T, V>*>(to) = pack;
    }
}

__device__ __forceinline__ float sigmoid(float x) { return rcp_fast(1.0f + exp2_fast(-1.4426950408889634f * x)); }

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
    return x;
}

long long quotient_up(long long a, long long b) { return (a + b - 1) / b; }

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<size_t>(pointer) % bytes == 0; }

template <int V>
struct Width {
    static constexpr int value = V;
};

// calls launch(T{}) for the type's number: fp32, bf16, fp16
template <typename Launch>
int with_type(int type, Launch launch) {
    switch (type) {
        case 0: return launch(float{});
        case 1: return launch(bf16{});
        case 2: return launch(fp16{});
    }
    return cudaErrorInvalidValue;
}

}  // namespace
