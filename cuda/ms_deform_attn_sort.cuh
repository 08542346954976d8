// Multi-scale deformable attention, backward, first part: the points of each (image, head, scale) are put in the order of their
// base cells, the upper left of their four neighbours, by a counting sort. `rank` counts those of each segment of the queries and
// gives every point its rank among those of its cell, `offset` makes places of the counts, and `scatter` writes what `gather`
// needs of a point, 16 bytes, to its place.
#pragma once
#include "ms_deform_attn_parts.cuh"

namespace {

constexpr int kSortThreads = 512, kOffsetThreads = 256, kScatterThreads = 256;
constexpr int kAhead = 6;  // points that a thread of `rank` places at a time
constexpr int kMoved = 4;  // points of a thread of `scatter`
constexpr int kMaxSegment = 65535;  // counts of a segment have 16 bits

// What `gather` needs of a point: query << point_bits | point, the way on to the next cell, and the weight.
struct alignas(16) Entry {
    int source;
    float y, x, weight;
};

// A block of the sort has points of one (image, head, scale), of a segment of its queries.
struct Segment {
    int scale, height, width;
    int begin, end;  // points
    long long list;  // (image, head, scale)
    long long row, step;  // of the first query's first point among all; from a query to the next one
    long long bins;       // the first bin of the list, in `counts` and `places`

    __device__ __forceinline__ Segment(const Params& p, const Maps& maps) {
        const int segment = blockIdx.x % p.segments;
        list = blockIdx.x / p.segments;
        scale = static_cast<int>(list % p.scales), height = maps.height[scale], width = maps.width[scale];
        const long long image_head = list / p.scales, points = static_cast<long long>(p.queries) << p.point_bits;
        const long long image = image_head / p.heads, head = image_head % p.heads;
        begin = static_cast<int>(points * segment / p.segments), end = static_cast<int>(points * (segment + 1) / p.segments);
        step = static_cast<long long>(p.heads) * p.scales * p.points;
        row = ((image * p.queries * p.heads + head) * p.scales + scale) * p.points;
        bins = (image_head * p.segments + segment) * maps.bin[p.scales] + maps.bin[scale];
    }

    // of the i-th point, or -1 where there is none
    __device__ __forceinline__ long long index(const Params& p, int i) const {
        const int query = i >> p.point_bits, point = i & ((1 << p.point_bits) - 1);
        return i < end && point < p.points ? row + query * step + point : -1;
    }

    __device__ __forceinline__ int bin(const Place& at) const { return (at.row + 1) * (width + 1) + at.column + 1; }
};

// The sum of the numbers of the lanes up to this one.
__device__ __forceinline__ int sum_upto(int x, int lane) {
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int other = __shfl_up_sync(kAll, x, lanes);
        if (lane >= lanes) x += other;
    }
    return x;
}

// The rank of each point among those of its bin and segment, in their order; and how many the bins up to each one have, from
// the window's first bin on. A block has a segment and a window of the bins. Its warps add to the counters one after the
// other, which takes little time beside waiting for the locations, and so has the order of the points.
__global__ void __launch_bounds__(kSortThreads) rank(const Params p, const Maps maps) {
    MFUSER_SHARED(shared);
    int* counters = reinterpret_cast<int*>(shared);  // (window + 32,)
    __shared__ int totals[kSortThreads / 32];
    const Segment segment(p, maps);
    const int first_bin = blockIdx.y * p.window;
    const int bins = min(p.window, (segment.height + 1) * (segment.width + 1) - first_bin);
    next_may_start();
    if (bins <= 0) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    unsigned short* ranks = p.ranks + (segment.list * p.queries << p.point_bits);

    for (int i = threadIdx.x; i < bins; i += blockDim.x) counters[i] = 0;
    __syncthreads();
    for (int first = segment.begin; first < segment.end; first += blockDim.x * kAhead) {
        const int i = first + warp * 32 * kAhead + lane;
        long long index[kAhead];
        Point point[kAhead];
        int bin[kAhead], counter[kAhead], before[kAhead];
        unsigned same[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) index[k] = segment.index(p, i + 32 * k);
        read_points<false>(p, index, point);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const Place at = place(point[k], segment.height, segment.width);
            const int found = segment.bin(at) - first_bin;
            bin[k] = at.inside && found >= 0 && found < bins ? found : -1;
        }
        // The first lane of a bin adds for all. The others add to a counter that nobody reads, which is faster than a branch.
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            same[k] = __match_any_sync(kAll, bin[k]);
            const bool first = (same[k] & ((1u << lane) - 1)) == 0;
            counter[k] = bin[k] >= 0 && first ? bin[k] : bins + lane;
            before[k] = __popc(same[k]);
        }
        const int turns = min(warps, (segment.end - first - 1) / (32 * kAhead) + 1);
        for (int turn = 0; turn < turns; ++turn) {
            if (warp == turn) {
                // none of these waits for what the counters were before
#pragma unroll
                for (int k = 0; k < kAhead; ++k) {
                    before[k] = atomicAdd(&counters[counter[k]], before[k]);
                    __syncwarp();
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int earlier = __popc(same[k] & ((1u << lane) - 1));
            const int rank = __shfl_sync(kAll, before[k], __ffs(static_cast<int>(same[k])) - 1) + earlier;
            if (bin[k] >= 0) ranks[i + 32 * k] = static_cast<unsigned short>(rank);
        }
    }

    // an odd run of bins for each thread: the threads of a warp read different banks
    const int run = (bins - 1) / static_cast<int>(blockDim.x) + 1 | 1;
    const int begin = min(run * static_cast<int>(threadIdx.x), bins), end = min(begin + run, bins);
    int sum = 0;
    for (int i = begin; i < end; ++i) sum += counters[i];
    const int upto = sum_upto(sum, lane);
    if (lane == 31) totals[warp] = upto;
    __syncthreads();
    int carry = upto - sum;
    for (int w = 0; w < warp; ++w) carry += totals[w];
    for (int i = begin; i < end; ++i) counters[i] = carry += counters[i];
    __syncthreads();
    unsigned short* counts = p.counts + segment.bins + first_bin;
    for (int i = threadIdx.x; i < bins; i += blockDim.x) counts[i] = static_cast<unsigned short>(counters[i]);
}

// Where the points of each bin start, and those of each segment within it. A block has a few bins of one window of a list.
__global__ void __launch_bounds__(kOffsetThreads) offset(const Params p, const Maps maps) {
    constexpr int kLoads = 8;
    __shared__ int windows_before;
    after_launch_before();
    next_may_start();
    const int list = blockIdx.x % (p.batch * p.heads * p.scales), scale = list % p.scales;
    const int first_bin = blockIdx.y * p.window, all = (maps.height[scale] + 1) * (maps.width[scale] + 1);
    const int bins = min(p.window, all - first_bin);
    const int bin = blockIdx.x / (p.batch * p.heads * p.scales) * blockDim.x + threadIdx.x;
    if (bin - static_cast<int>(threadIdx.x) >= bins) return;
    const long long image_head = list / p.scales, pitch = maps.bin[p.scales];
    const unsigned short* window = p.counts + image_head * p.segments * pitch + maps.bin[scale];
    int start = 0;
    if (first_bin > 0) {
        if (threadIdx.x == 0) windows_before = 0;
        __syncthreads();
        int sum = 0;
        for (int i = threadIdx.x; i < static_cast<int>(blockIdx.y) * p.segments; i += blockDim.x) {
            sum += window[i % p.segments * pitch + (i / p.segments + 1) * p.window - 1];
        }
        if (sum > 0) atomicAdd(&windows_before, sum);
        __syncthreads();
        start = windows_before;
        window += first_bin;
    }
    if (bin >= bins) return;
    for (int s = 0; s < p.segments; s += kLoads) {
        int before[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) before[i] = bin > 0 && s + i < p.segments ? window[(s + i) * pitch + bin - 1] : 0;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) start += before[i];
    }
    int* starts = p.starts + image_head * pitch + maps.bin[scale] + first_bin + bin;
    int* places = p.places + image_head * p.segments * pitch + maps.bin[scale] + first_bin + bin;
    *starts = start;
    for (int s = 0; s < p.segments; s += kLoads) {
        int before[kLoads], upto[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            before[i] = bin > 0 && s + i < p.segments ? window[(s + i) * pitch + bin - 1] : 0;
            upto[i] = s + i < p.segments ? window[(s + i) * pitch + bin] : 0;
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if (s + i < p.segments) places[(s + i) * pitch] = start;
            start += upto[i] - before[i];
        }
    }
    if (first_bin + bin == all - 1) starts[1] = start;
}

// Write the points in the order of the bins; those of one bin keep their order. A block has a part of a segment.
__global__ void __launch_bounds__(kScatterThreads) scatter(const Params p, const Maps maps) {
    const Segment segment(p, maps);
    const long long points = segment.list * p.queries << p.point_bits;
    const unsigned short* ranks = p.ranks + points;
    Entry* entries = static_cast<Entry*>(p.entries) + points;
    const int* places = p.places + segment.bins;
    const int first = segment.begin + blockIdx.y * (kScatterThreads * kMoved) + threadIdx.x;
    long long index[kMoved];
    Point point[kMoved];
    Place at[kMoved];
    int to[kMoved];
#pragma unroll
    for (int k = 0; k < kMoved; ++k) index[k] = segment.index(p, first + k * kScatterThreads);
    read_points(p, index, point);
#pragma unroll
    for (int k = 0; k < kMoved; ++k) at[k] = place(point[k], segment.height, segment.width);
    after_launch_before();
    next_may_start();
#pragma unroll
    for (int k = 0; k < kMoved; ++k) {
        to[k] = at[k].inside ? ranks[first + k * kScatterThreads] + places[segment.bin(at[k])] : 0;
    }
#pragma unroll
    for (int k = 0; k < kMoved; ++k) {
        if (at[k].inside) {
            entries[to[k]] = {first + k * kScatterThreads, at[k].y, at[k].x, point[k].weight};
        } else if (index[k] >= 0) {
            // no block of `gather` meets it
            p.dweights[index[k]] = p.dlocations[2 * index[k]] = p.dlocations[2 * index[k] + 1] = 0.0f;
        }
    }
}

}  // namespace
