// Multi-scale deformable attention (Zhu et al. 2021, eq. 3), forward and backward.
//
// Forward: a warp takes a few queries of one head, a group of lanes each. The lanes share the work of placing the query's
// points, leave cells and shares in shared memory, and then walk over the points with a few channels of every row each.
// The queries of a block are neighbours on their map, so that most rows come from the L1 cache.
//
// Backward: (1) the points of each (image, head, scale) are sorted by base cell, the upper left of their four neighbours,
// with a stable radix sort; (2) the same walk as forward gives the four inner products of each point with dout, and from
// them the gradients of weights and locations; (3) a block owns a tile of cells: it sums dout over the points of every
// base cell that reaches into the tile, once per corner, and then adds the four sums that meet in a cell. No atomics on
// floats: every sum has a fixed order, so the same inputs give the same bits.
//
// Locations are placed in fp32 whatever their type is; all sums are fp32.
#include <climits>

#include "device.cuh"

namespace {

constexpr int kMaxScales = 32;
constexpr int kChunk = 8;  // points of a query that wait in shared memory at a time
constexpr int kMaxThreads = 1024, kGatherThreads = 256, kSortThreads = 1024;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kAhead = 8;  // loads under way in a thread of `sort`
constexpr unsigned kAll = 0xFFFFFFFFu;

enum Type { kFloat32, kBFloat16, kFloat16 };

}  // namespace

struct MsDeformAttnParams {
    const void* value;      // (B, cells, M, D)
    const void* locations;  // (B, Q, M, S, P, 2), contiguous
    const void* weights;    // (B, Q, M, S, P), contiguous
    const void* dout;       // (B, Q, M, D), contiguous, of value's type
    void* out;              // the same
    void* dvalue;           // (B, cells, M, D), of value's type
    float* dlocations;      // as locations
    float* dweights;        // as weights
    int* sorted;            // scratch: two times (B, M, S, Q << point_bits) pairs of (base cell, query << point_bits | point)
    int* starts;            // scratch: (B, M, bins), a scale having (H + 1) * (W + 1) + 1 bins
    long long value_stride[3], dvalue_stride[3];        // of batch, cell and head in elements; channels are contiguous
    int value_type, location_type, weight_type;         // enum Type
    int batch, queries, heads, dim, scales, points, point_bits;  // 1 << point_bits >= points
    // what may be tuned
    int threads;     // of a block of `sample` and `probe`, a multiple of 32
    int query_bits;  // a tile has 4 ** query_bits queries, as a square where the queries are the cells
    int processors;  // 0: a tile is a block; else a block has as many as fill so many multiprocessors evenly
    int gather_threads;
    int cell_tile;   // side of a tile of cells
    int repeat;      // 16-byte pieces of a row per lane, 1 or 2
    int shapes[2 * kMaxScales];  // H, W of each scale
};

namespace {

using Params = MsDeformAttnParams;

// `cell`, `bin` and `tile` are sums over the scales before each one; the last entry is the total.
struct Maps {
    int height[kMaxScales], width[kMaxScales];
    int cell[kMaxScales + 1], bin[kMaxScales + 1];
    int tile[kMaxScales + 1];  // 0 throughout: the queries are no cells, a tile is a run of them
    int tiles, span;           // of queries; how many of them a block takes
    float per_point;           // 1 / P
};

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
    T x[V];
};

template <int V, typename T>
__device__ __forceinline__ void load(const void* from, float (&x)[V]) {
    const Pack<T, V> pack = *static_cast<const Pack<T, V>*>(from);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = to_float(pack.x[i]);
}

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

// Where a point falls: its base cell, -1 being the border before the first, and the way on to the next cell, 0..1.
struct Place {
    int row, column;
    float y, x;
    bool inside;  // some neighbour is in the map
};

__device__ __forceinline__ Place place(const Params& p, long long point, int height, int width) {
    const float x = fmaf(read(p.locations, 2 * point, p.location_type), static_cast<float>(width), -0.5f);
    const float y = fmaf(read(p.locations, 2 * point + 1, p.location_type), static_cast<float>(height), -0.5f);
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

__device__ __forceinline__ Tile find_tile(const Maps& maps, int index, int side) {
    int scale = 0;
    while (index >= maps.tile[scale + 1]) ++scale;
    index -= maps.tile[scale];
    const int columns = (maps.width[scale] + side - 1) / side;
    return {scale, index / columns * side, index % columns * side};
}

// A lane's place in a block of `sample` or `probe`: the block has one head's queries, a group of lanes takes one of them.
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
        const Tile tile = find_tile(maps, index, 1 << p.query_bits);
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
                for (int j = walk.own; j < count; j += kLanes) {
                    const int scale = scale_of(maps, first + j), height = maps.height[scale], width = maps.width[scale];
                    const long long point = row * total + first + j;
                    const Place at = place(p, point, height, width);
                    const Corners corner = corners(at, maps.cell[scale], height, width);
                    const float4 share = shares(at, read(p.weights, point, p.weight_type));
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

// Gradients of weights and locations, from the inner products of dout with the four neighbours of each point.
template <typename T, int V, int kLanes, int kRepeat>
__global__ void __launch_bounds__(kMaxThreads) probe(const Params p, const Maps maps) {
    constexpr int kGroups = 32 / kLanes, kStep = kLanes * V, kWidth = kStep * kRepeat;
    MFUSER_SHARED(shared);
    const Walk<kLanes> walk(p, maps);
    int4* cells = reinterpret_cast<int4*>(shared) + (walk.warp * kGroups + walk.group) * pitch(p);
    float4* inner = reinterpret_cast<float4*>(shared) + ((walk.warps + walk.warp) * kGroups + walk.group) * pitch(p);
    const int total = p.scales * p.points;
    const unsigned row_bytes = static_cast<unsigned>(p.value_stride[1] * static_cast<int>(sizeof(T)));
    const T* value = static_cast<const T*>(p.value) + walk.batch * p.value_stride[0] + walk.head * p.value_stride[2];

    for (int i = walk.warp * kGroups; i < walk.slots; i += walk.warps * kGroups) {
        const int found = walk.query(p, maps, i + walk.group);
        const int query = max(found, 0);
        const long long row = (static_cast<long long>(walk.batch) * p.queries + query) * p.heads + walk.head;
        for (int first = 0; first < total; first += kChunk) {
            const int count = min(kChunk, total - first);
            __syncwarp();
            for (int j = walk.own; j < count; j += kLanes) {
                const int scale = scale_of(maps, first + j), height = maps.height[scale], width = maps.width[scale];
                const Place at = place(p, row * total + first + j, height, width);
                cells[j] = corners(at, maps.cell[scale], height, width).cells;
            }
            __syncwarp();
            for (int start = 0; start < p.dim; start += kWidth) {
                const char* rows[kRepeat];
                float dout[kRepeat][V];
#pragma unroll
                for (int r = 0; r < kRepeat; ++r) {
                    const int channel = start + r * kStep + walk.own * V, safe = channel < p.dim ? channel : 0;
                    rows[r] = reinterpret_cast<const char*>(value + safe);
                    load<V, T>(static_cast<const T*>(p.dout) + row * p.dim + safe, dout[r]);
                }
#pragma unroll 2
                for (int j = 0; j < count; ++j) {
                    const int4 cell = cells[j];
                    const int cell_of[4] = {cell.x, cell.y, cell.z, cell.w};
                    float product[4] = {};
#pragma unroll
                    for (int r = 0; r < kRepeat; ++r) {
                        float x[4][V];
#pragma unroll
                        for (int c = 0; c < 4; ++c) load<V, T>(row_at(rows[r], cell_of[c], row_bytes), x[c]);
                        if (start + r * kStep + walk.own * V >= p.dim) continue;
#pragma unroll
                        for (int c = 0; c < 4; ++c) {
#pragma unroll
                            for (int v = 0; v < V; ++v) product[c] = fmaf(dout[r][v], x[c][v], product[c]);
                        }
                    }
                    const float sum = sum_each<kLanes>(product, walk.own);
                    if (walk.own % (kLanes / 4) == 0) {
                        float* to = reinterpret_cast<float*>(inner + j) + walk.own / (kLanes / 4);
                        *to = start == 0 ? sum : *to + sum;
                    }
                }
            }
            __syncwarp();
            for (int j = walk.own; found >= 0 && j < count; j += kLanes) {
                const int scale = scale_of(maps, first + j), height = maps.height[scale], width = maps.width[scale];
                const long long point = row * total + first + j;
                const Place at = place(p, point, height, width);
                const Corners corner = corners(at, 0, height, width);
                const float upper_left = corner.on[0] ? inner[j].x : 0.0f, upper_right = corner.on[1] ? inner[j].y : 0.0f;
                const float lower_left = corner.on[2] ? inner[j].z : 0.0f, lower_right = corner.on[3] ? inner[j].w : 0.0f;
                const float upper = fmaf(at.x, upper_right - upper_left, upper_left);
                const float lower = fmaf(at.x, lower_right - lower_left, lower_left);
                const float across = (1.0f - at.y) * (upper_right - upper_left) + at.y * (lower_right - lower_left);
                const float weight = read(p.weights, point, p.weight_type);
                p.dweights[point] = (1.0f - at.y) * upper + at.y * lower;
                p.dlocations[2 * point] = at.inside ? weight * static_cast<float>(width) * across : 0.0f;
                p.dlocations[2 * point + 1] = at.inside ? weight * static_cast<float>(height) * (lower - upper) : 0.0f;
            }
        }
    }
}

// Sort the points of one (image, head, scale) by base cell; points of one cell keep their order. Radix sort, least digit
// first: every warp has a run of points and counters of its own, so that a point's rank among those of its digit follows
// from the counts of the warps before and from the lanes before in its own.
__global__ void __launch_bounds__(kSortThreads) sort(const Params p, const Maps maps, int passes) {
    MFUSER_SHARED(shared);
    __shared__ int totals[kDigits / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int* counts = reinterpret_cast<int*>(shared);  // (warps, kDigits)
    int* mine = counts + warp * kDigits;
    unsigned* peers = reinterpret_cast<unsigned*>(counts + (warps + warp) * kDigits);  // lanes that have a digit
    const int scale = blockIdx.x % p.scales, height = maps.height[scale], width = maps.width[scale];
    const long long image_head = blockIdx.x / p.scales, image = image_head / p.heads, head = image_head % p.heads;
    const int entries = p.queries << p.point_bits, outside = (height + 1) * (width + 1);
    // pass by pass from one list to the other; the last list is the same for every scale
    int2* from = reinterpret_cast<int2*>(p.sorted) + static_cast<long long>(blockIdx.x) * entries;
    int2* to = from + static_cast<long long>(gridDim.x) * entries;

    const int run = (entries + 32 * warps - 1) / (32 * warps) * 32;
    const int begin = min(run * warp, entries), end = min(begin + run, entries);
    for (int i = lane; i < kDigits; i += 32) peers[i] = 0;

    // the i-th of the points in their first order
    const auto first = [&](int i) {
        const int query = i >> p.point_bits, point = i & ((1 << p.point_bits) - 1);
        if (i >= end || point >= p.points) return make_int2(outside, i);
        const long long row = (image * p.queries + query) * p.heads + head;
        const Place at = place(p, (row * p.scales + scale) * p.points + point, height, width);
        return make_int2(at.inside ? (at.row + 1) * (width + 1) + at.column + 1 : outside, i);
    };

    for (int pass = 0; pass < passes; ++pass) {
        const auto digit = [&](int2 pair) { return pair.x >> kDigitBits * pass & (kDigits - 1); };
        const auto entry = [&](int i) { return pass == 0 ? first(i) : i < end ? from[i] : make_int2(0, 0); };
        for (int i = lane; i < kDigits; i += 32) mine[i] = 0;
        __syncwarp();
        for (int i = begin + lane; i - lane < end; i += 32 * kAhead) {
            int2 pair[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; ++k) pair[k] = entry(i + 32 * k);
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                if (i + 32 * k < end) atomicAdd(&mine[digit(pair[k])], 1);
            }
        }
        __syncthreads();
        // counts become places: digit by digit, and warp by warp within a digit
        for (int d = threadIdx.x; d < kDigits; d += blockDim.x) {
            int sum = 0;
            for (int w = 0; w < warps; ++w) {
                const int count = counts[w * kDigits + d];
                counts[w * kDigits + d] = sum;
                sum += count;
            }
            int upto = sum;
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes *= 2) {
                const int other = __shfl_up_sync(kAll, upto, lanes);
                if (lane >= lanes) upto += other;
            }
            if (lane == 31) totals[d / 32] = upto;
            for (int w = 0; w < warps; ++w) counts[w * kDigits + d] += upto - sum;
        }
        __syncthreads();
        int before = 0;
#pragma unroll
        for (int k = 0; k < kDigits / 32; ++k) {
            mine[32 * k + lane] += before;
            before += totals[k];
        }
        __syncwarp();
        for (int i = begin + lane; i - lane < end; i += 32 * kAhead) {
            int2 pair[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; ++k) pair[k] = entry(i + 32 * k);
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                if (i - lane + 32 * k >= end) break;
                const bool active = i + 32 * k < end;
                const int d = digit(pair[k]);
                if (active) atomicAdd(&peers[d], 1u << lane);
                __syncwarp();
                const unsigned same = active ? peers[d] : 0, earlier = same & ((1u << lane) - 1);
                const int place = active ? mine[d] : 0;
                __syncwarp();
                if (active && earlier == 0) {
                    mine[d] = place + __popc(same);
                    peers[d] = 0;
                }
                __syncwarp();
                if (active) to[place + __popc(earlier)] = pair[k];
            }
        }
        __syncthreads();
        int2* const other = from;
        from = to, to = other;
    }
    // where each bin starts; the last one is of the points outside
    int* starts = p.starts + image_head * maps.bin[p.scales] + maps.bin[scale];
    for (int i = threadIdx.x; i <= entries; i += blockDim.x * kAhead) {
        int bin[kAhead], last[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            const int at = i + k * static_cast<int>(blockDim.x);
            bin[k] = at > 0 && at <= entries ? from[at - 1].x + 1 : 0;
            last[k] = at < entries ? from[at].x : at == entries ? outside : -1;
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            for (int b = bin[k]; b <= last[k]; ++b) starts[b] = i + k * static_cast<int>(blockDim.x);
        }
    }
}

// Gradients of values: a block has a tile of cells of one head and kWidth channels.
template <typename T, int V, int kLanes, int kRepeat>
__global__ void __launch_bounds__(kGatherThreads) gather(const Params p, const Maps maps, const int2* sorted) {
    constexpr int kGroups = 32 / kLanes, kStep = kLanes * V, kWidth = kStep * kRepeat;
    MFUSER_SHARED(shared);
    const int side = p.cell_tile, targets = side * side, bases = (side + 1) * (side + 1);
    float* slots = reinterpret_cast<float*>(shared);  // (4, targets, kWidth): what each corner brings to a cell
    float4* parts = reinterpret_cast<float4*>(slots + 4 * targets * kWidth);  // (threads,)
    int* queries = reinterpret_cast<int*>(parts + blockDim.x);                // (threads,)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int group = lane / kLanes, own = lane % kLanes, here = threadIdx.x - own;

    const unsigned tiles = maps.tile[p.scales];
    const long long image_head = blockIdx.x / tiles, image = image_head / p.heads, head = image_head % p.heads;
    const Tile tile = find_tile(maps, blockIdx.x % tiles, side);
    const int height = maps.height[tile.scale], width = maps.width[tile.scale];
    const int start = blockIdx.y * kWidth;
    const int* starts = p.starts + image_head * maps.bin[p.scales] + maps.bin[tile.scale];
    sorted += (image_head * p.scales + tile.scale) * static_cast<long long>(p.queries << p.point_bits);
    const unsigned row_bytes = static_cast<unsigned>(p.heads) * p.dim * static_cast<unsigned>(sizeof(T));
    const T* dout = static_cast<const T*>(p.dout) + (image * p.queries * p.heads + head) * p.dim;
    const char* rows[kRepeat];
#pragma unroll
    for (int r = 0; r < kRepeat; ++r) {
        const int channel = start + r * kStep + own * V;
        rows[r] = reinterpret_cast<const char*>(dout + (channel < p.dim ? channel : 0));
    }

    for (int k = warp * kGroups; k < bases; k += warps * kGroups) {
        const int base = k + group, row = base / (side + 1), column = base % (side + 1);  // in the tile, 0 = one before its first
        int begin = 0, count = 0;
        if (base < bases && tile.row + row <= height && tile.column + column <= width) {
            const int bin = (tile.row + row) * (width + 1) + tile.column + column;
            begin = starts[bin];
            count = starts[bin + 1] - begin;
        }
        int longest = count;
#pragma unroll
        for (int lanes = kLanes; lanes < 32; lanes *= 2) longest = max(longest, __shfl_xor_sync(kAll, longest, lanes));
        float sum[4][kRepeat][V] = {};
        for (int i = 0; i < longest; i += kLanes) {
            float4 part = make_float4(0, 0, 0, 0);
            int source = 0;  // the point's query
            if (i + own < count) {
                const int entry = sorted[begin + i + own].y;
                source = entry >> p.point_bits;
                const int point = entry & ((1 << p.point_bits) - 1);
                const long long index =
                    (((image * p.queries + source) * p.heads + head) * p.scales + tile.scale) * p.points + point;
                part = shares(place(p, index, height, width), read(p.weights, index, p.weight_type));
            }
            __syncwarp();
            parts[threadIdx.x] = part;
            queries[threadIdx.x] = source;
            __syncwarp();
            const int stop = min(kLanes, count - i);
#pragma unroll 4
            for (int j = 0; j < stop; ++j) {
                const float4 share = parts[here + j];
                const int query = queries[here + j];
#pragma unroll
                for (int r = 0; r < kRepeat; ++r) {
                    float x[V];
                    load<V, T>(row_at(rows[r], query, row_bytes), x);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        sum[0][r][v] = fmaf(share.x, x[v], sum[0][r][v]);
                        sum[1][r][v] = fmaf(share.y, x[v], sum[1][r][v]);
                        sum[2][r][v] = fmaf(share.z, x[v], sum[2][r][v]);
                        sum[3][r][v] = fmaf(share.w, x[v], sum[3][r][v]);
                    }
                }
            }
        }
        // each slot belongs to one corner of one base cell
        if (base >= bases) continue;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int to_row = row - 1 + c / 2, to_column = column - 1 + c % 2;
            if (to_row < 0 || to_row >= side || to_column < 0 || to_column >= side) continue;
            float* slot = slots + (c * targets + to_row * side + to_column) * kWidth;
#pragma unroll
            for (int r = 0; r < kRepeat; ++r) store<V, float>(slot + r * kStep + own * V, sum[c][r]);
        }
    }
    __syncthreads();
    T* dvalue = static_cast<T*>(p.dvalue) + image * p.dvalue_stride[0] + head * p.dvalue_stride[2];
    for (int i = threadIdx.x; i < targets * kLanes * kRepeat; i += blockDim.x) {
        const int target = i / (kLanes * kRepeat), offset = i % (kLanes * kRepeat) * V;
        const int row = tile.row + target / side, column = tile.column + target % side;
        if (row >= height || column >= width || start + offset >= p.dim) continue;
        float total[V] = {};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float x[V];
            load<V, float>(slots + (c * targets + target) * kWidth + offset, x);
#pragma unroll
            for (int v = 0; v < V; ++v) total[v] += x[v];
        }
        const long long cell = maps.cell[tile.scale] + row * width + column;
        store<V, T>(dvalue + cell * p.dvalue_stride[1] + start + offset, total);
    }
}

// `side`: of the tiles of cells.
Maps describe(const Params& p, int side) {
    Maps maps = {};
    for (int s = 0; s < p.scales; ++s) {
        const int height = p.shapes[2 * s], width = p.shapes[2 * s + 1];
        maps.height[s] = height, maps.width[s] = width;
        maps.cell[s + 1] = maps.cell[s] + height * width;
        maps.bin[s + 1] = maps.bin[s] + (height + 1) * (width + 1) + 1;
        maps.tile[s + 1] = maps.tile[s] + (height + side - 1) / side * ((width + side - 1) / side);
    }
    maps.tiles = maps.tile[p.scales], maps.span = 1;
    maps.per_point = 1.0f / static_cast<float>(p.points);
    return maps;
}

// How `sample` and `probe` share the queries among blocks.
Maps by_query(const Params& p) {
    Maps maps = describe(p, 1 << p.query_bits);
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
cudaError_t launch(const Params& p, bool forward, void* stream) {
    const Maps walk_maps = by_query(p), maps = describe(p, p.cell_tile);
    const long long pairs = static_cast<long long>(p.batch) * p.heads;
    const int blocks = (walk_maps.tiles + walk_maps.span - 1) / walk_maps.span;
    const size_t walk_bytes = static_cast<size_t>(p.threads) / kLanes * pitch(p) * (sizeof(int4) + sizeof(float4));
    const unsigned walk_grid = static_cast<unsigned>(pairs * blocks);
    if (forward) return MFUSER_LAUNCH((sample<T, V, kLanes, kRepeat>), walk_grid, p.threads, walk_bytes, stream, p, walk_maps);

    const long long entries = static_cast<long long>(p.queries) << p.point_bits;
    int bins = 1, passes = 1, sort_threads = 64;
    for (int s = 0; s < p.scales; ++s) bins = max(bins, maps.bin[s + 1] - maps.bin[s]);
    while (bins - 1 >> passes * kDigitBits) ++passes;
    while (sort_threads < kSortThreads && sort_threads * 8 < entries) sort_threads *= 2;
    cudaError_t error = MFUSER_LAUNCH(sort, static_cast<unsigned>(pairs * p.scales), sort_threads,
                                      sort_threads / 32 * kDigits * 2 * sizeof(int), stream, p, maps, passes);
    if (error != cudaSuccess) return error;
    error = MFUSER_LAUNCH((probe<T, V, kLanes, kRepeat>), walk_grid, p.threads, walk_bytes, stream, p, walk_maps);
    if (error != cudaSuccess) return error;
    const int2* sorted = reinterpret_cast<const int2*>(p.sorted) + passes % 2 * (pairs * p.scales * entries);
    constexpr int kWidth = kLanes * V * kRepeat;
    const size_t gather_bytes = 4 * sizeof(float) * p.cell_tile * p.cell_tile * kWidth +
                                static_cast<size_t>(p.gather_threads) * (sizeof(float4) + sizeof(int));
    const dim3 gather_grid(static_cast<unsigned>(pairs * maps.tile[p.scales]), (p.dim + kWidth - 1) / kWidth);
    return MFUSER_LAUNCH((gather<T, V, kLanes, kRepeat>), gather_grid, p.gather_threads, gather_bytes, stream, p, maps,
                         sorted);
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
    if (!aligned) return launch<T, 1, 32, 1>(p, forward, stream);
    if (p.dim <= 4 * V) return launch<T, V, 4, 1>(p, forward, stream);
    if (p.repeat == 2) return launch<T, V, 4, 2>(p, forward, stream);
    return launch<T, V, 8, 1>(p, forward, stream);
}

cudaError_t run(const Params& p, bool forward, void* stream) {
    if (p.scales < 1 || p.scales > kMaxScales || p.threads > kMaxThreads || p.gather_threads > kGatherThreads) {
        return cudaErrorInvalidValue;
    }
    const long long row_bytes = max(p.value_stride[1], static_cast<long long>(p.heads) * p.dim) * 4;
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
