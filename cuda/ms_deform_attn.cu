// Multi-scale deformable attention (Zhu et al. 2021, eq. 3), forward and backward.
//
// Forward: a warp takes a few queries of one head, a group of lanes each. The lanes share the work of placing the query's
// points, leave cells and shares in shared memory, and then walk over the points with a few channels of every row each.
// The queries of a block are neighbours on their map, so that most rows come from the L1 cache.
//
// Backward: (1) the points of each (image, head, scale) are put in the order of their base cells, the upper left of their
// four neighbours, by a counting sort: `rank` counts those of each segment of the queries and gives every point its rank
// among those of its cell, `offset` makes places of the counts, and `scatter` writes what step 2 needs of a point, 16 bytes,
// to its place. (2) In `gather` a block owns a tile of
// cells and groups of lanes share the points of all base cells that reach into the tile evenly. A group keeps the values of
// its base cell's four neighbours and the sums of dout over the points, once per neighbour; a row of dout, read once, gives
// both the gradients of values and, by its inner products with the neighbours, those of the point's weight and location.
// At last the four sums that meet in a cell are added. No atomics on floats: every sum has a fixed order, so the same
// inputs give the same bits.
//
// Each kernel of the backward may start while the one before it ends: it does what needs only the inputs first.
//
// Locations are placed in fp32 whatever their type is; all sums are fp32.
#include <climits>
#include <type_traits>

#include "device.cuh"

namespace {

constexpr int kMaxScales = 32;
constexpr int kChunk = 16;  // points of a query that wait in shared memory at a time
constexpr int kMaxThreads = 1024, kSortThreads = 512, kOffsetThreads = 256, kScatterThreads = 256;
constexpr int gather_threads(int channels) { return channels == 8 ? 256 : 384; }  // of a block, two of which share a processor
constexpr int kAhead = 6;  // points that a thread of `rank` places at a time
constexpr int kMoved = 4;  // points of a thread of `scatter`
constexpr int kBatch = 4;  // rows under way for a lane of `gather`
constexpr int kMaxSegment = 65535;  // counts of a segment have 16 bits
constexpr unsigned kAll = 0xFFFFFFFFu;

enum Type { kFloat32, kBFloat16, kFloat16 };

}  // namespace

struct MsDeformAttnParams {
    const void* value;      // (B, cells, M, D)
    const void* locations;  // (B, Q, M, S, P, 2), contiguous, aligned to 8 bytes where it is fp32
    const void* weights;    // (B, Q, M, S, P), contiguous
    const void* dout;       // (B, Q, M, D), contiguous, of value's type
    void* out;              // the same
    void* dvalue;           // (B, cells, M, D), of value's type
    float* dlocations;      // as locations
    float* dweights;        // as weights
    void* entries;          // scratch: (B, M, S, Q << point_bits) of 16 bytes, the points in the order of the base cells
    int* starts;            // scratch: (B, M, bins), a scale having (H + 1) * (W + 1) + 1 bins: where each one's entries start
    int* places;            // scratch: (B, M, segments, bins): where those of a segment of the queries start
    unsigned short* counts;  // scratch: the same shape: how many a segment has up to a bin, from the first one of a window on
    unsigned short* ranks;   // scratch: (B, M, S, Q << point_bits): of a point, among those of its bin and segment
    long long value_stride[3], dvalue_stride[3];        // of batch, cell and head in elements; channels are contiguous
    int value_type, location_type, weight_type;         // enum Type
    int batch, queries, heads, dim, scales, points, point_bits;  // 1 << point_bits >= points
    int segments;  // each of at most kMaxSegment points of a scale
    // what may be tuned
    int threads;     // of a block of `sample` and `probe`, a multiple of 32
    int query_bits;  // a tile has 4 ** query_bits queries, as a square where the queries are the cells
    int processors;  // 0: a tile is a block; else a block has as many as fill so many multiprocessors evenly
    int repeat;      // 16-byte pieces of a row per lane of `sample`, 1 or 2
    int gather_threads;
    int gather_channels;  // of a lane of `gather`, 4 or 8
    int cell_tile;        // largest side of a tile of cells
    int sort_threads;     // of a block of `rank`, a multiple of 32
    int window;           // bins that such a block has counters for; a larger map takes several blocks
    int shapes[2 * kMaxScales];  // H, W of each scale
};

namespace {

using Params = MsDeformAttnParams;

// `cell`, `bin` and `tile` are sums over the scales before each one; the last entry is the total.
struct Maps {
    int height[kMaxScales], width[kMaxScales];
    int cell[kMaxScales + 1], bin[kMaxScales + 1];
    int tile[kMaxScales + 1];  // 0 throughout: the queries are no cells, a tile is a run of them
    int tile_height[kMaxScales], tile_width[kMaxScales];
    int tiles, span;           // of queries; how many of them a block takes
    float per_point;           // 1 / P
};

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
    T x[V];
};

template <int V, typename T>
__device__ __forceinline__ void widen(const Pack<T, V>& pack, float (&x)[V]) {
    if constexpr (std::is_same_v<T, bf16> && V % 2 == 0) {
        // bf16 is the upper half of fp32: one instruction each, for which two must come as one word
        const union {
            Pack<T, V> pack;
            unsigned words[V / 2];
        } same{pack};
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = __uint_as_float(i % 2 ? same.words[i / 2] & 0xFFFF0000u : same.words[i / 2] << 16);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = to_float(pack.x[i]);
    }
}

template <int V, typename T>
__device__ __forceinline__ void load(const void* from, float (&x)[V]) {
    const Pack<T, V> pack = *static_cast<const Pack<T, V>*>(from);
    widen(pack, x);
}

// The same bits in words where there are some: nvcc takes elements of 16 bits apart as soon as they arrive, and waits for that.
template <typename T, int V>
using Raw = std::conditional_t<sizeof(T) * V % 4 == 0, Pack<unsigned, (sizeof(T) * V + 3) / 4>, Pack<T, V>>;

template <int V, typename T>
union Bits {
    Raw<T, V> raw;
    Pack<T, V> pack;
};

// One multiply-add of 32 to 64 bits: rows are less than 4 GB apart.
__device__ __forceinline__ const char* row_at(const char* first, int row, unsigned row_bytes) {
    return first + static_cast<unsigned long long>(static_cast<unsigned>(row)) * row_bytes;
}

template <int V, typename T>
__device__ __forceinline__ void store(void* to, const float (&x)[V]) {
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.x[i] = from_float<T>(x[i]);
    *static_cast<Pack<T, V>*>(to) = pack;
}

__device__ __forceinline__ float read(const void* from, long long index, int type) {
    if (type == kBFloat16) return to_float(static_cast<const bf16*>(from)[index]);
    if (type == kFloat16) return to_float(static_cast<const fp16*>(from)[index]);
    return static_cast<const float*>(from)[index];
}

struct Point {
    float x, y, weight;
};

// Those of the indices that are not -1; the others come to lie outside. One branch for the usual types, so that all loads
// are under way together.
template <bool kWeights = true, int N>
__device__ __forceinline__ void read_points(const Params& p, const long long (&index)[N], Point (&point)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) point[k] = {-9.0f, -9.0f, 0.0f};
    if (p.location_type == kFloat32 && (p.weight_type == kFloat32 || !kWeights)) {
        const float2* locations = static_cast<const float2*>(p.locations);
        const float* weights = static_cast<const float*>(p.weights);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (index[k] < 0) continue;
            const float2 location = locations[index[k]];
            point[k] = {location.x, location.y, kWeights ? weights[index[k]] : 0.0f};
        }
    } else {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (index[k] < 0) continue;
            point[k] = {read(p.locations, 2 * index[k], p.location_type), read(p.locations, 2 * index[k] + 1, p.location_type),
                        kWeights ? read(p.weights, index[k], p.weight_type) : 0.0f};
        }
    }
}

// Where a point falls: its base cell, -1 being the border before the first, and the way on to the next cell, 0..1.
struct Place {
    int row, column;
    float y, x;
    bool inside;  // some neighbour is in the map
};

__device__ __forceinline__ Place place(const Point& point, int height, int width) {
    const float x = fmaf(point.x, static_cast<float>(width), -0.5f);
    const float y = fmaf(point.y, static_cast<float>(height), -0.5f);
    // false for what is not a number
    if (!(x > -1.0f && x < static_cast<float>(width) && y > -1.0f && y < static_cast<float>(height))) return {0, 0, 0, 0, false};
    const float left = floorf(x), top = floorf(y);
    return {static_cast<int>(top), static_cast<int>(left), y - top, x - left, true};
}

// The bilinear shares of the neighbours, row by row, times the point's weight.
__device__ __forceinline__ float4 shares(const Place& at, float weight) {
    const float lower = weight * at.y, upper = weight * (1.0f - at.y);
    return make_float4(upper * (1.0f - at.x), upper * at.x, lower * (1.0f - at.x), lower * at.x);
}

struct Corners {
    int4 cells;  // rows of value; a neighbour off the map has some cell of the map instead
    bool on[4];
};

__device__ __forceinline__ Corners corners(const Place& at, int first, int height, int width) {
    const bool left = at.inside && at.column >= 0, right = at.inside && at.column + 1 < width;
    const bool top = at.row >= 0, bottom = at.row + 1 < height;
    const int column = max(at.column, 0), next = min(at.column + 1, width - 1);
    const int upper = first + max(at.row, 0) * width, lower = first + min(at.row + 1, height - 1) * width;
    return {make_int4(upper + column, upper + next, lower + column, lower + next),
            {top && left, top && right, bottom && left, bottom && right}};
}

struct Tile {
    int scale, row, column;  // of its first cell
};

__device__ __forceinline__ Tile find_tile(const Maps& maps, int index) {
    int scale = 0;
    while (index >= maps.tile[scale + 1]) ++scale;
    index -= maps.tile[scale];
    const int columns = (maps.width[scale] - 1) / maps.tile_width[scale] + 1;
    return {scale, index / columns * maps.tile_height[scale], index % columns * maps.tile_width[scale]};
}

// A lane's place in a block of `sample`: the block has one head's queries, a group of lanes takes one of them.
template <int kLanes>
struct Walk {
    int own, group, warp, warps;
    int batch, head, first, slots;

    __device__ __forceinline__ Walk(const Params& p, const Maps& maps) {
        const int lane = threadIdx.x % 32;
        own = lane % kLanes, group = lane / kLanes, warp = threadIdx.x / 32, warps = blockDim.x / 32;
        const unsigned blocks = (maps.tiles + maps.span - 1) / maps.span;
        first = blockIdx.x % blocks * maps.span;
        slots = min(maps.span, maps.tiles - first) << 2 * p.query_bits;
        head = blockIdx.x / blocks % p.heads, batch = blockIdx.x / blocks / p.heads;
    }

    // the block's i-th query, or -1
    __device__ __forceinline__ int query(const Params& p, const Maps& maps, int i) const {
        if (i >= slots) return -1;
        const int index = first + (i >> 2 * p.query_bits), at = i & ((1 << 2 * p.query_bits) - 1);
        if (maps.tile[p.scales] == 0) {
            const int query = (index << 2 * p.query_bits) + at;
            return query < p.queries ? query : -1;
        }
        const Tile tile = find_tile(maps, index);
        const int row = tile.row + (at >> p.query_bits), column = tile.column + (at & ((1 << p.query_bits) - 1));
        const int width = maps.width[tile.scale];
        return row < maps.height[tile.scale] && column < width ? maps.cell[tile.scale] + row * width + column : -1;
    }
};

// A place for `chunk` points of each group. The odd pitch puts what the groups read together into different banks.
__host__ __device__ __forceinline__ int pitch(const Params& p) { return min(p.scales * p.points, kChunk) | 1; }

__device__ __forceinline__ int scale_of(const Maps& maps, int point) {
    // exact: a half is far more than what rounding can do to so small a number
    return static_cast<int>((static_cast<float>(point) + 0.5f) * maps.per_point);
}

template <typename T, int V, int kLanes, int kRepeat>
__global__ void __launch_bounds__(kMaxThreads) sample(const Params p, const Maps maps) {
    constexpr int kGroups = 32 / kLanes, kStep = kLanes * V, kWidth = kStep * kRepeat;
    constexpr int kOwn = kLanes < kChunk ? kChunk / kLanes : 1;  // points that a lane places
    MFUSER_SHARED(shared);
    const Walk<kLanes> walk(p, maps);
    int4* cells = reinterpret_cast<int4*>(shared) + (walk.warp * kGroups + walk.group) * pitch(p);
    float4* parts = reinterpret_cast<float4*>(shared) + ((walk.warps + walk.warp) * kGroups + walk.group) * pitch(p);
    const int total = p.scales * p.points;
    const unsigned row_bytes = static_cast<unsigned>(p.value_stride[1] * static_cast<int>(sizeof(T)));
    const T* value = static_cast<const T*>(p.value) + walk.batch * p.value_stride[0] + walk.head * p.value_stride[2];

    for (int i = walk.warp * kGroups; i < walk.slots; i += walk.warps * kGroups) {
        const int found = walk.query(p, maps, i + walk.group);
        // a group without a query goes along with the first and stores nothing
        const int query = max(found, 0);
        const long long row = (static_cast<long long>(walk.batch) * p.queries + query) * p.heads + walk.head;
        for (int start = 0; start < p.dim; start += kWidth) {
            const char* rows[kRepeat];
            float sum[kRepeat][V] = {};
#pragma unroll
            for (int r = 0; r < kRepeat; ++r) {
                const int channel = start + r * kStep + walk.own * V;
                rows[r] = reinterpret_cast<const char*>(value + (channel < p.dim ? channel : 0));
            }
            for (int first = 0; first < total; first += kChunk) {
                const int count = min(kChunk, total - first);
                __syncwarp();
                long long index[kOwn];
                Point point[kOwn];
#pragma unroll
                for (int k = 0; k < kOwn; ++k) {
                    const int j = walk.own + k * kLanes;
                    index[k] = j < count ? row * total + first + j : -1;
                }
                read_points(p, index, point);
#pragma unroll
                for (int k = 0; k < kOwn; ++k) {
                    const int j = walk.own + k * kLanes;
                    if (j >= count) break;
                    const int scale = scale_of(maps, first + j), height = maps.height[scale], width = maps.width[scale];
                    const Place at = place(point[k], height, width);
                    const Corners corner = corners(at, maps.cell[scale], height, width);
                    const float4 share = shares(at, point[k].weight);
                    cells[j] = corner.cells;
                    parts[j] = make_float4(corner.on[0] ? share.x : 0.0f, corner.on[1] ? share.y : 0.0f,
                                           corner.on[2] ? share.z : 0.0f, corner.on[3] ? share.w : 0.0f);
                }
                __syncwarp();
#pragma unroll 2
                for (int j = 0; j < count; ++j) {
                    const int4 cell = cells[j];
                    const float4 part = parts[j];
                    const int cell_of[4] = {cell.x, cell.y, cell.z, cell.w};
                    const float part_of[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
                    for (int r = 0; r < kRepeat; ++r) {
                        float x[4][V];
#pragma unroll
                        for (int c = 0; c < 4; ++c) load<V, T>(row_at(rows[r], cell_of[c], row_bytes), x[c]);
#pragma unroll
                        for (int c = 0; c < 4; ++c) {
#pragma unroll
                            for (int v = 0; v < V; ++v) sum[r][v] = fmaf(part_of[c], x[c][v], sum[r][v]);
                        }
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < kRepeat; ++r) {
                const int channel = start + r * kStep + walk.own * V;
                if (found >= 0 && channel < p.dim) store<V, T>(static_cast<T*>(p.out) + row * p.dim + channel, sum[r]);
            }
        }
    }
}

// The sums of four numbers over a group of lanes, one each: lane l gets that of number l / (kLanes / 4).
template <int kLanes>
__device__ __forceinline__ float sum_each(const float (&x)[4], int own) {
    const bool second = own & kLanes / 2, odd = own & kLanes / 4;
    float a = second ? x[2] : x[0], b = second ? x[3] : x[1];
    a += __shfl_xor_sync(kAll, second ? x[0] : x[2], kLanes / 2);
    b += __shfl_xor_sync(kAll, second ? x[1] : x[3], kLanes / 2);
    float sum = (odd ? b : a) + __shfl_xor_sync(kAll, odd ? a : b, kLanes / 4);
#pragma unroll
    for (int lanes = kLanes / 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
    return sum;
}

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

// The shared memory of `gather`, in bytes from its first on; `side` is that of the largest tile.
template <typename T, int kWidth>
struct Layout {
    int sums, parts, inner, entries, values, sources, starts, shifts, rows, bytes;

    __host__ __device__ Layout(int side, int threads, int lanes) {
        const int bases = (side + 1) * (side + 1), cells = (side + 2) * (side + 2);
        sums = 0;  // (bases + groups, 4, kWidth): what the points of a base cell bring to its four neighbours
        parts = sums + (bases + threads / lanes) * 4 * kWidth * 4;  // (threads,) of 16 bytes
        inner = parts + threads * 16;                               // the same
        entries = inner + threads * 16;                             // the same
        values = entries + threads * 16;                            // (cells, kWidth)
        sources = values + (cells * kWidth * static_cast<int>(sizeof(T)) + 15) / 16 * 16;  // (threads,) of 8 bytes
        starts = sources + threads * 8;                                                     // (bases + 1,)
        shifts = starts + (bases + 1) * 4;                                                  // (bases,)
        rows = shifts + bases * 4;                                                          // (bases,)
        bytes = rows + bases * 4;
    }
};

// All gradients: a block has a tile of cells of one head.
template <typename T, int V, int kLanes, int kRepeat>
__global__ void __launch_bounds__(gather_threads(V * kRepeat), 2) gather(const Params p, const Maps maps) {
    constexpr int kStep = kLanes * V, kWidth = kStep * kRepeat;
    MFUSER_SHARED(shared);
    const Layout<T, kWidth> layout(p.cell_tile, blockDim.x, kLanes);
    float* sums = reinterpret_cast<float*>(shared + layout.sums);
    float4* parts = reinterpret_cast<float4*>(shared + layout.parts);
    float4* inner = reinterpret_cast<float4*>(shared + layout.inner);
    Entry* kept = reinterpret_cast<Entry*>(shared + layout.entries);  // for later: registers are scarce
    T* values = reinterpret_cast<T*>(shared + layout.values);
    int2* sources = reinterpret_cast<int2*>(shared + layout.sources);  // of each point: its query and its base cell
    int* starts = reinterpret_cast<int*>(shared + layout.starts);      // of the base cells' points in the tile's list
    int* shifts = reinterpret_cast<int*>(shared + layout.shifts);      // from there to the place among the entries
    int* row_of = reinterpret_cast<int*>(shared + layout.rows);        // of a base cell
    const int own = threadIdx.x % kLanes, group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
    const int here = threadIdx.x - own;

    const unsigned pairs = static_cast<unsigned>(p.batch) * p.heads;
    const long long image_head = blockIdx.x % pairs, image = image_head / p.heads, head = image_head % p.heads;
    // the smallest map has the longest lists: these blocks come first, whether it is the first map or the last
    const int index = blockIdx.x / pairs, tiles = maps.tile[p.scales];
    const Tile tile = find_tile(maps, maps.cell[1] <= maps.cell[p.scales] - maps.cell[p.scales - 1] ? index : tiles - 1 - index);
    const int height = maps.height[tile.scale], width = maps.width[tile.scale];
    const int rows = min(maps.tile_height[tile.scale], height - tile.row);
    const int columns = min(maps.tile_width[tile.scale], width - tile.column);
    // base cells are counted from the one before the tile's first, in each direction; so are the cells of `values`, of
    // which a row has one more: base cell b has its neighbours at b + row_of[b] and 1, pitch + 1 and pitch + 2 from there
    const int pitch = columns + 1, bases = (rows + 1) * pitch, targets = rows * columns;
    const T* value = static_cast<const T*>(p.value) + image * p.value_stride[0] + head * p.value_stride[2];
    using Piece = Raw<T, V>;
    const auto load_values = [&](int start, int first, int step) {
        for (int i = first; i < (rows + 2) * (columns + 2) * kLanes * kRepeat; i += step) {
            const int cell = i / (kLanes * kRepeat), offset = i % (kLanes * kRepeat) * V;
            // a neighbour off the map has some cell of the map instead
            const int row = min(max(tile.row - 1 + cell / (columns + 2), 0), height - 1);
            const int column = min(max(tile.column - 1 + cell % (columns + 2), 0), width - 1);
            const long long at = maps.cell[tile.scale] + row * width + column;
            const T* from = value + at * p.value_stride[1] + start + offset;
            Piece* to = reinterpret_cast<Piece*>(values + cell * kWidth + offset);
            if (start + offset >= p.dim) {
                *to = Piece{};
            } else if constexpr (sizeof(Piece) >= 4) {
                copy_async<sizeof(Piece)>(to, from);
            } else {
                *to = *reinterpret_cast<const Piece*>(from);
            }
        }
        copies_done();
    };

    // While the first warps find the points, the others bring the values.
    const int finders = blockDim.x > 128 ? 96 : blockDim.x > 32 ? 32 : 0, thread = threadIdx.x;
    if (thread >= finders) load_values(0, thread - finders, blockDim.x - finders);
    after_launch_before();
    if (thread < finders || finders == 0) {
        // a row of base cells is a run of the entries, and the tile's list is these runs, one after the other
        constexpr int kLoads = 8;
        const int* all = p.starts + image_head * maps.bin[p.scales] + maps.bin[tile.scale];
        for (int i = thread; i <= bases; i += finders ? finders : blockDim.x) {
            const int row = i / pitch;
            int before = 0;
            for (int r = 0; r < row; r += kLoads) {
#pragma unroll
                for (int k = 0; k < kLoads; ++k) {
                    const int* run = all + (tile.row + r + k) * (width + 1) + tile.column;
                    if (r + k < row) before += run[pitch] - run[0];
                }
            }
            if (i < bases) {
                const int* run = all + (tile.row + row) * (width + 1) + tile.column;
                row_of[i] = row;
                shifts[i] = run[0] - before;
                before += run[i - row * pitch] - run[0];
            }
            starts[i] = before;
        }
    }
    __syncthreads();
    const int points = starts[bases], share = (points + groups - 1) / groups;
    const int begin = min(group * share, points), end = min(begin + share, points);
    const Entry* entries =
        static_cast<const Entry*>(p.entries) + ((image_head * p.scales + tile.scale) * p.queries << p.point_bits);
    const unsigned row_bytes = static_cast<unsigned>(p.heads) * p.dim * static_cast<unsigned>(sizeof(T));
    const T* dout = static_cast<const T*>(p.dout) + (image * p.queries * p.heads + head) * p.dim;
    T* dvalue = static_cast<T*>(p.dvalue) + image * p.dvalue_stride[0] + head * p.dvalue_stride[2];

    for (int start = 0; start < p.dim; start += kWidth) {
        if (start > 0) {
            load_values(start, threadIdx.x, blockDim.x);
            __syncthreads();
        }

        const char* dout_rows[kRepeat];
        bool real[kRepeat];  // channels
#pragma unroll
        for (int r = 0; r < kRepeat; ++r) {
            const int channel = start + r * kStep + own * V;
            real[r] = channel < p.dim;
            dout_rows[r] = reinterpret_cast<const char*>(dout + (real[r] ? channel : 0));
        }
        float sum[4][kRepeat][V] = {}, corner[4][kRepeat][V] = {};
        int base = -1;  // that of these sums
        // A base cell's points are the work of one group or of several in a row; all but the first have a place of their own.
        const auto flush = [&] {
            float* to = sums + (starts[base] < begin ? bases + group : base) * (4 * kWidth) + own * V;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int r = 0; r < kRepeat; ++r) {
                    store<V, float>(to + c * kWidth + r * kStep, sum[c][r]);
#pragma unroll
                    for (int v = 0; v < V; ++v) sum[c][r][v] = 0.0f;
                }
            }
        };
        const auto load_corners = [&] {
            const T* upper = values + (base + row_of[base]) * kWidth + own * V;
            const T* lower = upper + (columns + 2) * kWidth;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int r = 0; r < kRepeat; ++r) {
                    load<V, T>((c < 2 ? upper : lower) + c % 2 * kWidth + r * kStep, corner[c][r]);
                }
            }
        };

        int at = 0;  // the base cell of the lane's next point
        for (int past = bases; past - at > 1;) {
            const int middle = (at + past) / 2;
            (starts[middle] <= begin ? at : past) = middle;
        }
        Entry next = {0, 0.0f, 0.0f, 0.0f};
        const auto look_ahead = [&](int i) {
            if (i >= end) return;
            while (starts[at + 1] <= i) ++at;
            next = entries[shifts[at] + i];
        };
        look_ahead(begin + own);
        // The row of a point is under way while those of the batch before it are in use. Behind the group's last point there is
        // some point from before, whose row is not used.
        Piece pieces[kBatch][kRepeat];
        const auto bring = [&](int k, int query) {
#pragma unroll
            for (int r = 0; r < kRepeat; ++r) {
                pieces[k][r] = *reinterpret_cast<const Piece*>(row_at(dout_rows[r], query, row_bytes));
            }
        };
        const auto bring_next = [&](int k) { bring(k, __shfl_sync(kAll, next.source >> p.point_bits, here % 32 + k)); };
#pragma unroll
        for (int k = 0; k < kBatch; ++k) bring_next(k);
        for (int done = 0; done < share; done += kLanes) {
            const int count = end - begin - done;
            __syncwarp();
            parts[threadIdx.x] = shares({0, 0, next.y, next.x, true}, next.weight);
            sources[threadIdx.x] = make_int2(next.source >> p.point_bits, at);
            kept[threadIdx.x] = next;
            look_ahead(begin + done + kLanes + own);
            __syncwarp();
            const int steps = min(kLanes, share - done);
            const int live = real[0] ? count : 0;
            for (int first = 0; first < steps; first += kBatch) {
                int next_base[kBatch];
#pragma unroll
                for (int k = 0; k < kBatch; ++k) next_base[k] = sources[here + first + k].y;
#pragma unroll
                for (int k = 0; k < kBatch; ++k) {
                    if (first + k >= steps) break;
                    float product[4] = {};
                    if (first + k < live) {
                        if (next_base[k] != base) {
                            if (base >= 0) flush();
                            base = next_base[k];
                            load_corners();
                        }
                        const float4 part = parts[here + first + k];
#pragma unroll
                        for (int r = 0; r < kRepeat; ++r) {
                            if (r > 0 && !real[r]) break;
                            float x[V];
                            widen(Bits<V, T>{pieces[k][r]}.pack, x);
#pragma unroll
                            for (int v = 0; v < V; ++v) {
                                sum[0][r][v] = fmaf(part.x, x[v], sum[0][r][v]);
                                sum[1][r][v] = fmaf(part.y, x[v], sum[1][r][v]);
                                sum[2][r][v] = fmaf(part.z, x[v], sum[2][r][v]);
                                sum[3][r][v] = fmaf(part.w, x[v], sum[3][r][v]);
#pragma unroll
                                for (int c = 0; c < 4; ++c) product[c] = fmaf(corner[c][r][v], x[v], product[c]);
                            }
                        }
                    }
                    if (first + kBatch < steps) {
                        bring(k, sources[here + first + kBatch + k].x);
                    } else if (done + kLanes < share) {
                        bring_next(k);
                    }
                    const float total = sum_each<kLanes>(product, own);
                    if (own % (kLanes / 4) == 0) reinterpret_cast<float*>(inner + here + first + k)[own / (kLanes / 4)] = total;
                }
            }
            __syncwarp();
            const Entry entry = kept[threadIdx.x];
            const int at = sources[threadIdx.x].y, down = row_of[at], along = at - down * pitch;
            // points of the base cells before the tile are the work of the tile that these are in, if there is one
            if (own < count && (down > 0 || tile.row == 0) && (along > 0 || tile.column == 0)) {
                const bool top = tile.row + down > 0, bottom = tile.row + down < height;
                const bool left = tile.column + along > 0, right = tile.column + along < width;
                const float4 product = inner[threadIdx.x];
                const float upper_left = top && left ? product.x : 0.0f, upper_right = top && right ? product.y : 0.0f;
                const float lower_left = bottom && left ? product.z : 0.0f, lower_right = bottom && right ? product.w : 0.0f;
                const float upper = fmaf(entry.x, upper_right - upper_left, upper_left);
                const float lower = fmaf(entry.x, lower_right - lower_left, lower_left);
                const float across = (1.0f - entry.y) * (upper_right - upper_left) + entry.y * (lower_right - lower_left);
                const int query = entry.source >> p.point_bits, point = entry.source & ((1 << p.point_bits) - 1);
                const long long row = (image * p.queries + query) * p.heads + head;
                const long long index = (row * p.scales + tile.scale) * p.points + point;
                float dweight = (1.0f - entry.y) * upper + entry.y * lower;
                float2 dlocation = make_float2(entry.weight * static_cast<float>(width) * across,
                                               entry.weight * static_cast<float>(height) * (lower - upper));
                float2* to = reinterpret_cast<float2*>(p.dlocations) + index;
                if (start > 0) {
                    dweight += p.dweights[index];
                    dlocation = make_float2(dlocation.x + to->x, dlocation.y + to->y);
                }
                p.dweights[index] = dweight;
                *to = dlocation;
            }
        }
        if (base >= 0) flush();
        __syncthreads();

        for (int i = threadIdx.x; i < targets * kLanes * kRepeat; i += blockDim.x) {
            const int target = i / (kLanes * kRepeat), offset = i % (kLanes * kRepeat) * V;
            if (start + offset >= p.dim) continue;
            const int row = target / columns, column = target % columns;
            float total[V] = {};
            const auto add = [&](const float* from) {
                float x[V];
                load<V, float>(from + offset, x);
#pragma unroll
                for (int v = 0; v < V; ++v) total[v] += x[v];
            };
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int base = (row + 1 - c / 2) * pitch + column + 1 - c % 2, first = starts[base], past = starts[base + 1];
                if (first == past) continue;
                add(sums + (base * 4 + c) * kWidth);
#pragma unroll 1
                for (int g = first / share + 1; g * share < past; ++g) add(sums + ((bases + g) * 4 + c) * kWidth);
            }
            const long long cell = maps.cell[tile.scale] + (tile.row + row) * width + tile.column + column;
            T* to = dvalue + cell * p.dvalue_stride[1] + start + offset;
            if constexpr (sizeof(T) == 2 && V % 2 == 0) {
                Piece piece;
#pragma unroll
                for (int v = 0; v < V; v += 2) {
                    Bits<2, T> pair{};
                    pair.pack.x[0] = from_float<T>(total[v]), pair.pack.x[1] = from_float<T>(total[v + 1]);
                    piece.x[v / 2] = pair.raw.x[0];
                }
                *reinterpret_cast<Piece*>(to) = piece;
            } else {
                store<V, T>(to, total);
            }
        }
        __syncthreads();
    }
}

// `side`: of the tiles of cells, the largest one if `even` is to make those of a map about the same.
Maps describe(const Params& p, int side, bool even) {
    const auto tiles = [&](int extent) { return (extent - 1) / side + 1; };
    const auto tile = [&](int extent) { return even ? (extent - 1) / tiles(extent) + 1 : side; };
    Maps maps = {};
    for (int s = 0; s < p.scales; ++s) {
        const int height = p.shapes[2 * s], width = p.shapes[2 * s + 1];
        maps.height[s] = height, maps.width[s] = width;
        maps.tile_height[s] = tile(height), maps.tile_width[s] = tile(width);
        maps.cell[s + 1] = maps.cell[s] + height * width;
        maps.bin[s + 1] = maps.bin[s] + (height + 1) * (width + 1) + 1;
        maps.tile[s + 1] = maps.tile[s] + ((height - 1) / maps.tile_height[s] + 1) * ((width - 1) / maps.tile_width[s] + 1);
    }
    maps.tiles = maps.tile[p.scales], maps.span = 1;
    maps.per_point = 1.0f / static_cast<float>(p.points);
    return maps;
}

// How `sample` shares the queries among blocks.
Maps by_query(const Params& p) {
    Maps maps = describe(p, 1 << p.query_bits, false);
    if (p.queries != maps.cell[p.scales]) {
        for (int& tile : maps.tile) tile = 0;
        maps.tiles = (p.queries - 1 >> 2 * p.query_bits) + 1;
    }
    if (p.processors) {
        // the fewest parts of a head whose blocks fill nine tenths of the multiprocessors, in as many waves as they take
        const long long pairs = static_cast<long long>(p.batch) * p.heads;
        long long parts = 1;
        while (pairs * parts * 10 < (pairs * parts + p.processors - 1) / p.processors * p.processors * 9) ++parts;
        maps.span = static_cast<int>((maps.tiles + parts - 1) / parts);
    }
    return maps;
}

template <typename T, int V, int kLanes, int kRepeat>
cudaError_t launch_forward(const Params& p, void* stream) {
    const Maps maps = by_query(p);
    const int blocks = (maps.tiles + maps.span - 1) / maps.span;
    const size_t bytes = static_cast<size_t>(p.threads) / kLanes * pitch(p) * (sizeof(int4) + sizeof(float4));
    const unsigned grid = static_cast<unsigned>(static_cast<long long>(p.batch) * p.heads * blocks);
    return MFUSER_LAUNCH((sample<T, V, kLanes, kRepeat>), grid, p.threads, bytes, stream, p, maps);
}

cudaError_t sort(const Params& p, void* stream) {
    const Maps maps = describe(p, p.cell_tile, true);
    if (p.segments < 1 || ((static_cast<long long>(p.queries) << p.point_bits) - 1) / p.segments >= kMaxSegment) {
        return cudaErrorInvalidValue;
    }
    int bins = 1;
    for (int s = 0; s < p.scales; ++s) bins = max(bins, maps.bin[s + 1] - maps.bin[s] - 1);
    const unsigned lists = static_cast<unsigned>(p.batch) * p.heads * p.scales;
    const int window = min(p.window, bins), windows = (bins - 1) / p.window + 1;
    const dim3 by_window(lists * p.segments, windows);
    cudaError_t error = MFUSER_LAUNCH(rank, by_window, p.sort_threads, (window + 32) * sizeof(int), stream, p, maps);
    if (error != cudaSuccess) return error;
    const dim3 by_bins(lists * ((window - 1) / kOffsetThreads + 1), windows);
    error = MFUSER_LAUNCH_NEXT(offset, by_bins, kOffsetThreads, 0, stream, p, maps);
    if (error != cudaSuccess) return error;
    const long long longest = ((static_cast<long long>(p.queries) << p.point_bits) - 1) / p.segments + 1;
    const dim3 by_points(lists * p.segments, static_cast<unsigned>((longest - 1) / (kScatterThreads * kMoved) + 1));
    return MFUSER_LAUNCH_NEXT(scatter, by_points, kScatterThreads, 0, stream, p, maps);
}

template <typename T, int V, int kLanes, int kRepeat>
cudaError_t launch_backward(const Params& p, void* stream) {
    const Maps maps = describe(p, p.cell_tile, true);
    const Layout<T, kLanes * V * kRepeat> layout(p.cell_tile, p.gather_threads, kLanes);
    if (p.gather_threads > gather_threads(V * kRepeat)) return cudaErrorInvalidValue;
    const unsigned grid = static_cast<unsigned>(static_cast<long long>(p.batch) * p.heads * maps.tile[p.scales]);
    return MFUSER_LAUNCH_NEXT((gather<T, V, kLanes, kRepeat>), grid, p.gather_threads, static_cast<size_t>(layout.bytes), stream,
                              p, maps);
}

template <typename T>
bool in_pieces(const void* pointer, const long long (&stride)[3]) {
    bool pieces = reinterpret_cast<size_t>(pointer) % 16 == 0;
    for (long long step : stride) pieces = pieces && step * static_cast<long long>(sizeof(T)) % 16 == 0;
    return pieces;
}

template <typename T>
cudaError_t choose(const Params& p, bool forward, void* stream) {
    constexpr int V = 16 / sizeof(T);
    const long long contiguous[3] = {p.dim, p.dim, p.dim};
    // of the pointers that this direction does not have, null passes
    const bool aligned = in_pieces<T>(p.value, p.value_stride) && in_pieces<T>(p.dvalue, p.dvalue_stride) &&
                         in_pieces<T>(p.out, contiguous) && in_pieces<T>(p.dout, contiguous);
    if (forward) {
        if (!aligned) return launch_forward<T, 1, 32, 1>(p, stream);
        if (p.dim <= 4 * V) return launch_forward<T, V, 4, 1>(p, stream);
        if (p.repeat == 2) return launch_forward<T, V, 4, 2>(p, stream);
        return launch_forward<T, V, 8, 1>(p, stream);
    }
    cudaError_t error = sort(p, stream);
    if (error != cudaSuccess) return error;
    if (!aligned) return launch_backward<T, 1, 32, 1>(p, stream);
    if (p.dim <= 16) return launch_backward<T, 4, 4, 1>(p, stream);
    if (p.gather_channels == 8) return launch_backward<T, V, 4, 8 / V>(p, stream);
    return launch_backward<T, 4, 8, 1>(p, stream);
}

cudaError_t run(const Params& p, bool forward, void* stream) {
    if (p.scales < 1 || p.scales > kMaxScales || p.threads > kMaxThreads ||
        p.sort_threads > kSortThreads || p.window < 1) {
        return cudaErrorInvalidValue;
    }
    const long long row_bytes = max(p.value_stride[1], static_cast<long long>(p.heads) * p.dim) * 4;
    if (p.location_type == kFloat32 && reinterpret_cast<size_t>(p.locations) % 8 != 0) return cudaErrorInvalidValue;
    if ((static_cast<long long>(p.queries) << p.point_bits) > INT_MAX || row_bytes > UINT_MAX) return cudaErrorInvalidValue;
    switch (p.value_type) {
        case kFloat32: return choose<float>(p, forward, stream);
        case kBFloat16: return choose<bf16>(p, forward, stream);
        case kFloat16: return choose<fp16>(p, forward, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

MFUSER_EXPORT(mfuser_ms_deform_attn_fwd, MsDeformAttnParams) { return run(*params, true, stream); }
MFUSER_EXPORT(mfuser_ms_deform_attn_bwd, MsDeformAttnParams) { return run(*params, false, stream); }
