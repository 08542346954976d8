// Multi-scale deformable attention: arguments, and what its passes share: where a point falls, and how rows are read.
#pragma once
#include <climits>
#include <type_traits>

#include "device.cuh"

namespace {

constexpr int kMaxScales = 32;
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

}  // namespace
