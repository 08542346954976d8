// What the emulation promises, case by case. The cases before `kUndefined` give the same bytes on a GPU; the others are
// mistakes, which the emulation has to notice. `tests/mfuser/ops/test_emulation.py` says what each must give.
#include "device.cuh"

enum Case {
    kShuffles, kVotes, kRounding, kIndices, kLastBlock, kTooManyThreads, kTooMuchShared, kNoBlocks, kLargeShared,
    kUndefined,
    kStaleShared = kUndefined, kMissingBarrier, kMissingWarpBarrier,
    kSomeSkipBarrier, kTwoBarriers, kSomeReturn, kBehindShared, kBeforeShared, kMaskWithoutCaller, kTwoPrimitives,
    kLaneAtBarrier, kMisaligned, kOutOfBounds,
};

struct SemanticsParams {
    const float* in;
    void* out;
    int count;
    int which;
};

__global__ void shuffles(const float* in, float* out) {
    const unsigned all = 0xFFFFFFFFu;
    const int t = threadIdx.x, n = blockDim.x, lane = t % 32;
    const float v = in[t];
    int row = 0;
    out[n * row++ + t] = __shfl_xor_sync(all, v, 5);
    out[n * row++ + t] = __shfl_xor_sync(all, v, 3, 8);
    out[n * row++ + t] = __shfl_up_sync(all, v, 3);
    out[n * row++ + t] = __shfl_up_sync(all, v, 3, 8);
    out[n * row++ + t] = __shfl_down_sync(all, v, 3);
    out[n * row++ + t] = __shfl_down_sync(all, v, 3, 8);
    out[n * row++ + t] = __shfl_sync(all, v, 7);
    out[n * row++ + t] = __shfl_sync(all, v, lane + 1);
    out[n * row++ + t] = __shfl_sync(all, v, lane + 1, 16);
    // halves of a warp on their own, as often as they like
    float half = v;
    if (lane < 16) {
        half = __shfl_xor_sync(0x0000FFFFu, half, 1);
        half = __shfl_xor_sync(0x0000FFFFu, half, 2);
    } else {
        half = __shfl_xor_sync(0xFFFF0000u, half, 4);
    }
    out[n * row++ + t] = half;
    out[n * row++ + t] = static_cast<float>(__shfl_xor_sync(all, static_cast<double>(v), 1));
    out[n * row++ + t] = static_cast<float>(__shfl_xor_sync(all, static_cast<int>(v), 1));
}

__global__ void votes(const float* in, unsigned* out) {
    const unsigned all = 0xFFFFFFFFu;
    const int t = threadIdx.x, n = blockDim.x;
    const int positive = in[t] > 0.0f;
    out[t] = __ballot_sync(all, positive);
    out[n + t] = __any_sync(all, positive);
    out[2 * n + t] = __all_sync(all, positive);
    unsigned odd = 0;
    if (t % 2) odd = __ballot_sync(0xAAAAAAAAu, positive);
    out[3 * n + t] = odd;
    out[4 * n + t] = __match_any_sync(all, t % 7 - 3);
    // who has returned is not waited for
    if (t % 32 == 3) return;
    out[5 * n + t] = __reduce_add_sync(all, t % 32);
}

__global__ void rounding(const float* in, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    out[i] = to_float(from_float<bf16>(in[i]));
    out[count + i] = to_float(from_float<fp16>(in[i]));
}

__global__ void indices(int* out) {
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    out[block * threads + thread] = block * 1000 + __shfl_sync(0x00FFFFFFu, thread, 23 - thread);
}

// the block that finishes last sees what all others wrote
__global__ void last_block(const float* in, int* out, int count) {
    __shared__ int is_last;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) atomicAdd(&out[1], static_cast<int>(in[i]));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&out[0], 1) == static_cast<int>(gridDim.x) - 1;
    __syncthreads();
    if (is_last && threadIdx.x == 0) out[2] = atomicAdd(&out[1], 0);
}

__global__ void large_shared(const float* in, float* out, int count) {
    MFUSER_SHARED(memory);
    float* values = reinterpret_cast<float*>(memory);
    for (int i = threadIdx.x; i < count; i += blockDim.x) values[count - 1 - i] = in[i];
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = values[i];
}

__global__ void nothing() {}

template <int kCount>
__device__ float read_unwritten() {
    __shared__ float values[kCount];
    if (threadIdx.x == 0) values[0] = 1.0f;
    __syncthreads();
    return values[threadIdx.x];
}

__global__ void stale_shared(float* out) {
    MFUSER_SHARED(memory);
    __shared__ float values[32];
    if (threadIdx.x == 0) values[0] = reinterpret_cast<float*>(memory)[0] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x];
    out[32 + threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
    out[64 + threadIdx.x] = read_unwritten<32>();
}

template <bool kInWarp>
__global__ void missing_barrier(const float* in, float* out) {
    __shared__ float values[64];
    const int t = threadIdx.x;
    values[t] = in[t];
    out[t] = values[kInWarp ? t ^ 1 : (t + 32) % 64];
}

__global__ void mistake(const float* in, float* out, int which) {
    MFUSER_SHARED(memory);
    float* values = reinterpret_cast<float*>(memory);
    const int t = threadIdx.x;
    if (which == kSomeReturn && t == 3) return;
    if (which == kBehindShared && t == 0) values[64] = 1.0f;
    if (which == kBeforeShared && t == 0) memory[-1] = 1;
    if (which == kMaskWithoutCaller) out[t] = __shfl_sync(0xFFFF0000u, in[t], 16);
    if (which == kTwoPrimitives) out[t] = t % 2 ? __shfl_sync(0xFFFFFFFFu, in[t], 0) : __any_sync(0xFFFFFFFFu, t);
    if (which == kLaneAtBarrier && t != 5) __syncwarp();
    if (which == kMisaligned) reinterpret_cast<float4*>(out + t)[0] = make_float4(0.0f, 1.0f, 2.0f, 3.0f);
    if (which == kOutOfBounds) out[t] = in[64 + t];
    if (which == kTwoBarriers) {
        if (t < 32) {
            __syncthreads();
        } else {
            __syncthreads();
        }
    }
    if (which != kSomeSkipBarrier || t < 32) __syncthreads();
}

MFUSER_EXPORT(mfuser_semantics, SemanticsParams);

extern "C" int mfuser_semantics(const SemanticsParams* p, void* stream) {
    float* floats = static_cast<float*>(p->out);
    int* ints = static_cast<int*>(p->out);
    switch (p->which) {
        case kShuffles: return MFUSER_LAUNCH(shuffles, 1, p->count, 0, stream, p->in, floats);
        case kVotes: return MFUSER_LAUNCH(votes, 1, p->count, 0, stream, p->in, static_cast<unsigned*>(p->out));
        case kRounding: return MFUSER_LAUNCH(rounding, (p->count + 255) / 256, 256, 0, stream, p->in, floats, p->count);
        case kIndices: return MFUSER_LAUNCH(indices, dim3(2, 3, 2), dim3(4, 3, 2), 0, stream, ints);
        case kLastBlock: return MFUSER_LAUNCH(last_block, (p->count + 31) / 32, 32, 0, stream, p->in, ints, p->count);
        case kTooManyThreads: return MFUSER_LAUNCH(nothing, 1, 1025, 0, stream);
        case kTooMuchShared: return MFUSER_LAUNCH(nothing, 1, 32, 1 << 20, stream);
        case kNoBlocks: return MFUSER_LAUNCH(nothing, 0, 32, 0, stream);
        case kLargeShared: return MFUSER_LAUNCH(large_shared, 1, 96, p->count * 4, stream, p->in, floats, p->count);
        case kStaleShared: return MFUSER_LAUNCH(stale_shared, 1, 32, 128, stream, floats);
        case kMissingBarrier: return MFUSER_LAUNCH((missing_barrier<false>), 1, 64, 0, stream, p->in, floats);
        case kMissingWarpBarrier: return MFUSER_LAUNCH((missing_barrier<true>), 1, 64, 0, stream, p->in, floats);
    }
    return MFUSER_LAUNCH(mistake, 1, 64, 256, stream, p->in, floats, p->which);
}
