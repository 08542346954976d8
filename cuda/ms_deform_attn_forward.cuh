// Multi-scale deformable attention, forward: a warp takes a few queries of one head, a group of lanes each. The lanes share the
// work of placing the query's points, leave cells and shares in shared memory, and then walk over the points with a few channels
// of every row each. The queries of a block are neighbours on their map, so that most rows come from the L1 cache.
#pragma once
#include "ms_deform_attn_parts.cuh"

namespace {

constexpr int kChunk = 16;  // points of a query that wait in shared memory at a time
constexpr int kMaxThreads = 1024;

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

}  // namespace
