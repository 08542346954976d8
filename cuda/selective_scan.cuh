// The selective scan (S6), forward and backward; mfuser/ops/selective_scan/reference.py has the equations.
//
// A channel's states lie in the registers of G neighbouring lanes, S = 4 in each, and a lane serves K channels: what it
// reads of B and C from shared memory serves them all, and so many independent recurrences hide the latency of one. The
// sequence is cut into chunks that run side by side in two passes: the first gives what each chunk hands on when it
// starts from zero (`end`) and how long it lasts (`total`, the sum of delta: the decay over a chunk is exp(A total)); in
// the second every chunk folds the summaries of those before it into its own start. With enough sequences to fill the
// GPU there is one chunk and no first pass. The backward does the same from the other end.
//
// What is per step and channel (loads, softplus, gate, stores) is done once, by the warp that has the channel, with
// channels along the lanes, and meets the lanes of the recurrence in shared memory. Rows of B and C serve all warps of a
// block: two buffers take turns, so that a tile of steps has one barrier.
//
// The forward keeps the states at every kSub-th step. The backward runs kHold steps forward from there, holding the
// states in registers, then walks them back. Sums over channels (dB, dC) go by shuffles over the warp's channels, by
// shared memory over the block's, and by `scan_finish` over the blocks, always in the same order.
//
// The kernels are in selective_scan_forward.cuh and selective_scan_backward.cuh; here they are launched.
#pragma once

#include "selective_scan_backward.cuh"
#include "selective_scan_forward.cuh"

namespace {

template <int G, int K, int WARPS>
dim3 grid_of(const ScanParams& p, int chunks) {
    constexpr int channels = Place<G, K, WARPS>::kChannels;
    return dim3((p.dim + channels - 1) / channels, chunks, p.batch);
}

// of shared memory; `vectors`: B, or B and C; `tensors`: (tile_steps, channels) of T, `sums`: the same of float
template <typename T, int G, int K>
constexpr size_t forward_bytes(int vectors, int tensors, int sums) {
    using P = Place<G, K, kForwardWarps>;
    const size_t of_channel = sizeof(float2) + tensors * sizeof(T) + sums * sizeof(float);
    return kTile<T> * (P::kChannels * of_channel + 2 * vectors * P::kStates * sizeof(float));
}

template <typename T, int G, int K, bool SOFTPLUS, bool GATED>
cudaError_t forward(const ScanParams& p, void* stream) {
    constexpr int threads = 32 * kForwardWarps;
    if (p.chunks > 1) {
        const dim3 grid = grid_of<G, K, kForwardWarps>(p, p.chunks - 1);
        const cudaError_t error =
            MFUSER_LAUNCH_NEXT((scan_summary<T, G, K, false, SOFTPLUS, false>), grid, threads,
                               (forward_bytes<T, G, K>(1, 2, 0)), stream, p);
        if (error != cudaSuccess) return error;
    }
    const dim3 grid = grid_of<G, K, kForwardWarps>(p, p.chunks);
    constexpr size_t bytes = forward_bytes<T, G, K>(2, GATED ? 4 : 3, 1);
    if (p.chunks > 1) return MFUSER_LAUNCH_NEXT((scan_forward<T, G, K, SOFTPLUS, GATED>), grid, threads, bytes, stream, p);
    return MFUSER_LAUNCH((scan_forward<T, G, K, SOFTPLUS, GATED>), grid, threads, bytes, stream, p);
}

template <typename T, int G, int FORWARD_K, int K, bool SOFTPLUS, bool GATED>
cudaError_t backward(const ScanParams& p, void* stream) {
    constexpr int threads = 32 * kBackwardWarps;
    constexpr size_t first_bytes = forward_bytes<T, G, FORWARD_K>(1, GATED ? 3 : 2, 0);
    constexpr size_t bytes = BackwardMemory<T, G, K, GATED>::kBytes;
    const dim3 grid = grid_of<G, K, kBackwardWarps>(p, p.chunks);
    cudaError_t error;
    if (p.chunks > 1) {
        const dim3 first_grid = grid_of<G, FORWARD_K, kForwardWarps>(p, p.chunks - 1);
        error = MFUSER_LAUNCH_NEXT((scan_summary<T, G, FORWARD_K, true, SOFTPLUS, GATED>), first_grid, 32 * kForwardWarps,
                                   first_bytes, stream, p);
        if (error != cudaSuccess) return error;
        error = MFUSER_LAUNCH_NEXT((scan_backward<T, G, K, SOFTPLUS, GATED>), grid, threads, bytes, stream, p);
    } else {
        error = MFUSER_LAUNCH((scan_backward<T, G, K, SOFTPLUS, GATED>), grid, threads, bytes, stream, p);
    }
    if (error != cudaSuccess) return error;
    const int64_t all = 2 * int64_t(p.batch) * p.length * p.state_size + int64_t(p.dim) * (p.state_size + 2);
    return MFUSER_LAUNCH_NEXT((scan_finish<T>), dim3((all + 255) / 256), 256, 0, stream, p, int(grid.x));
}

// Lanes and channels by N: 8 and 16 states fit exactly, others are padded with zeros.
struct Two {
    static constexpr int G = 2, kForward = 2, kBackward = 1;
};
struct FourLanes {
    static constexpr int G = 4, kForward = 2, kBackward = 2;
};
struct Sixteen {
    static constexpr int G = 16, kForward = 4, kBackward = 2;
};

// a template argument for each switch
template <typename T, typename L>
cudaError_t forward_as(const ScanParams& p, void* stream) {
    constexpr int G = L::G, K = L::kForward;
    if (p.softplus) return p.z ? forward<T, G, K, true, true>(p, stream) : forward<T, G, K, true, false>(p, stream);
    return p.z ? forward<T, G, K, false, true>(p, stream) : forward<T, G, K, false, false>(p, stream);
}

template <typename T, typename L>
cudaError_t backward_as(const ScanParams& p, void* stream) {
    constexpr int G = L::G, F = L::kForward, K = L::kBackward;
    if (p.softplus) return p.z ? backward<T, G, F, K, true, true>(p, stream) : backward<T, G, F, K, true, false>(p, stream);
    return p.z ? backward<T, G, F, K, false, true>(p, stream) : backward<T, G, F, K, false, false>(p, stream);
}

inline bool well_formed(const ScanParams& p) {
    return p.sub == kSub && p.chunk % kSub == 0 && p.dim % 4 == 0 && p.state_size % 4 == 0 && p.state_size <= 64;
}

template <typename T>
cudaError_t forward_any(const ScanParams& p, void* stream) {
    if (!well_formed(p)) return cudaErrorInvalidValue;
    if (p.state_size <= 8) return forward_as<T, Two>(p, stream);
    if (p.state_size <= 16) return forward_as<T, FourLanes>(p, stream);
    return forward_as<T, Sixteen>(p, stream);
}

template <typename T>
cudaError_t backward_any(const ScanParams& p, void* stream) {
    if (!well_formed(p)) return cudaErrorInvalidValue;
    if (p.state_size <= 8) return backward_as<T, Two>(p, stream);
    if (p.state_size <= 16) return backward_as<T, FourLanes>(p, stream);
    return backward_as<T, Sixteen>(p, stream);
}

}  // namespace
