// A kernel that is small and touches the whole chain: bf16 in and out, shuffles, both kinds of shared memory.
// out[r] = scale * (sum over columns of x[r] squared), summed in fp32
#include "device.cuh"

struct ProbeParams {
    const void* x;  // (rows, columns)
    void* out;      // (rows,)
    long long row_stride;
    int rows, columns;
    float scale;
    int is_bf16;
};

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) probe(ProbeParams p) {
    MFUSER_SHARED(memory);
    float* partial = reinterpret_cast<float*>(memory);
    __shared__ float total;
    const T* x = static_cast<const T*>(p.x) + static_cast<long long>(blockIdx.x) * p.row_stride;
    float sum = 0.0f;
    for (int c = threadIdx.x; c < p.columns; c += kThreads) {
        const float value = to_float(x[c]);
        sum = fmaf(value, value, sum);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        total = 0.0f;
        for (int w = 0; w < kThreads / 32; ++w) total += partial[w];
    }
    __syncthreads();
    if (threadIdx.x == kThreads - 1) static_cast<T*>(p.out)[blockIdx.x] = from_float<T>(p.scale * total);
}

MFUSER_EXPORT(mfuser_probe, ProbeParams);

extern "C" int mfuser_probe(const ProbeParams* p, void* stream) {
    constexpr int kThreads = 128;
    const size_t bytes = kThreads / 32 * sizeof(float);
    if (p->is_bf16) return MFUSER_LAUNCH((probe<bf16, kThreads>), p->rows, kThreads, bytes, stream, *p);
    return MFUSER_LAUNCH((probe<float, kThreads>), p->rows, kThreads, bytes, stream, *p);
}
