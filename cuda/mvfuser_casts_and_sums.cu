// MVFuser's small change: casts before its matrix products, sums of partial gradients after them.
#include "mvfuser_parts.cuh"

namespace {

constexpr int kCastThreads = 256, kCastRepeat = 2;
constexpr int kSumColumns = 32, kSumGroups = 16;

template <typename S, typename T, int V>
__device__ __forceinline__ void cast_block(const MvfuserCastPiece& p, long long block) {
    const S* source = static_cast<const S*>(p.source);
    T* target = static_cast<T*>(p.target);
    const long long width = p.columns / V, count = p.rows * width;
    Pack<S, V> in[kCastRepeat];
    long long to[kCastRepeat];
#pragma unroll
    for (int r = 0; r < kCastRepeat; ++r) {
        const long long i = (block * kCastRepeat + r) * kCastThreads + threadIdx.x;
        const long long row = p.rows == 1 ? 0 : i / width, column = (i - row * width) * V;
        to[r] = i < count ? row * p.target_stride + column : -1;
        in[r] = load_if<S, V>(i < count, source + row * p.source_stride + column);
    }
#pragma unroll
    for (int r = 0; r < kCastRepeat; ++r) {
        if (to[r] < 0) continue;
        Pack<T, V> out;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float value = to_float(in[r].item[i]);
            out.item[i] = from_float<T>(p.factor * (p.exponential ? expf(value) : value));
        }
        store(target + to[r], out);
    }
}

template <typename S, typename T>
__device__ __forceinline__ void cast_piece(const MvfuserCastPiece& p, long long block) {
    p.vectors ? cast_block<S, T, 8>(p, block) : cast_block<S, T, 1>(p, block);
}

// T is the one type besides fp32
template <typename T>
__global__ void __launch_bounds__(kCastThreads) cast(const __grid_constant__ MvfuserCastParams params) {
    after_launch_before();
    int i = 0;
    while (blockIdx.x >= params.piece[i].blocks) ++i;
    const MvfuserCastPiece& p = params.piece[i];
    const long long block = blockIdx.x - (i ? params.piece[i - 1].blocks : 0);
    if (p.source_type == 0) {
        p.target_type == 0 ? cast_piece<float, float>(p, block) : cast_piece<float, T>(p, block);
    } else {
        p.target_type == 0 ? cast_piece<T, float>(p, block) : cast_piece<T, T>(p, block);
    }
}

}  // namespace

MFUSER_EXPORT(mfuser_mvfuser_cast, MvfuserCastParams);

extern "C" int mfuser_mvfuser_cast(const MvfuserCastParams* given, void* stream) {
    MvfuserCastParams params = *given;
    long long blocks = 0;
    int type = 0;
    for (int i = 0; i < params.pieces; ++i) {
        MvfuserCastPiece& p = params.piece[i];
        const bool strides = p.rows == 1 || (p.source_stride % 8 == 0 && p.target_stride % 8 == 0);
        p.vectors = strides && p.columns % 8 == 0 && aligned(p.source, 16) && aligned(p.target, 16);
        p.blocks = blocks += quotient_up(p.rows * p.columns / (p.vectors ? 8 : 1), kCastThreads * kCastRepeat);
        for (int other : {p.source_type, p.target_type}) {
            if (other && type && other != type) return cudaErrorInvalidValue;
            if (other) type = other;
        }
    }
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    return with_type(type, [&](auto t) {
        return MFUSER_LAUNCH_NEXT((cast<decltype(t)>), static_cast<unsigned>(blocks), kCastThreads, 0, stream, params);
    });
}

namespace {

// target[c] = factor * times[c] * sum over rows of source[:, c], always in the same order
__global__ void __launch_bounds__(kSumColumns * kSumGroups) sum_rows(const __grid_constant__ MvfuserSumParams params) {
    after_launch_before();
    __shared__ float shared[kSumGroups][kSumColumns];
    int i = 0;
    while (static_cast<int>(blockIdx.x) >= params.piece[i].blocks) ++i;
    const MvfuserSumPiece& p = params.piece[i];
    const int c = (blockIdx.x - (i ? params.piece[i - 1].blocks : 0)) * kSumColumns + threadIdx.x;
    float sum = 0.0f;
    if (c < p.columns) {
#pragma unroll 4
        for (int r = threadIdx.y; r < p.rows; r += kSumGroups) sum += p.source[r * p.stride + c];
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= p.columns) return;
    for (int g = 1; g < kSumGroups; ++g) sum += shared[g][threadIdx.x];
    p.target[c] = p.factor * sum * (p.times ? p.times[c] : 1.0f);
}

}  // namespace

MFUSER_EXPORT(mfuser_mvfuser_sum, MvfuserSumParams);

extern "C" int mfuser_mvfuser_sum(const MvfuserSumParams* given, void* stream) {
    MvfuserSumParams params = *given;
    int blocks = 0;
    for (int i = 0; i < params.pieces; ++i) {
        params.piece[i].blocks = blocks += (params.piece[i].columns - 1) / kSumColumns + 1;
    }
    return MFUSER_LAUNCH_NEXT(sum_rows, blocks, dim3(kSumColumns, kSumGroups), 0, stream, params);
}
