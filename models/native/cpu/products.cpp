// Products of a few rows on a CPU core, and draws from their logits: what plain decoding and verification spend their time on.
//
// Library products are made for hundreds of rows: with one to sixteen they spend most of their time on the way to the
// arithmetic. Here weights are packed once into panels of as many columns as the accumulators of one row fill, so that
// they are read from end to end, and a block of rows shares every read. One thread: there is nothing to wait for.
//
// A row's result does not depend on the rows beside it: every output is one sum, over inputs in their order.
//
// Compiled by compiler.py with GCC or Clang for the machine's own instructions; float32 alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#define LANES 16
#define VECTORS 4  // 6 rows * 4 accumulators and 4 weights, of 32 registers
#define NAME "AVX-512"
#elif defined(__AVX2__)
#define LANES 8
#define VECTORS 2  // 6 * 2 and 2, of 16
#define NAME "AVX2"
#elif defined(__ARM_NEON)
#define LANES 4
#define VECTORS 4
#define NAME "NEON"
#else
#define LANES 4
#define VECTORS 2
#define NAME "128-bit vectors"
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef float quarter __attribute__((vector_size(16), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4)));

static const int64_t PANEL = LANES * VECTORS;
static const int64_t BLOCK = 6;  // rows that share a read of the weights

static const int64_t FEW = 4;    // queries of a head for which attention takes its keys as they are

static inline int64_t panels(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

static inline vec load(const float* at) { return *reinterpret_cast<const vec*>(at); }
static inline void store(float* at, vec value) { *reinterpret_cast<vec*>(at) = value; }

// Rows of numbers, `row` apart from one another, the numbers of a row `step` apart.
struct Rows {
    const float* at;
    int64_t row, step;
};

// y [ROWS, N vectors] (+)= x [ROWS, in] @ weights [in, N vectors]; `width` of the columns exist in y. Rows of weights and y are
// `stride` and `out` numbers apart.
template <int ROWS, int N>
static inline void tile(Rows x, int64_t in, const float* weights, int64_t stride, float* y, int64_t out, int64_t width, bool add) {
    vec sums[ROWS][N];
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < N; v++) sums[row][v] = vec{};
    for (int64_t k = 0; k < in; k++) {
        vec weight[N];
        for (int v = 0; v < N; v++) weight[v] = load(weights + k * stride + v * LANES);
        for (int row = 0; row < ROWS; row++) {
            const float value = x.at[row * x.row + k * x.step];
            for (int v = 0; v < N; v++) sums[row][v] += value * weight[v];
        }
    }
    for (int row = 0; row < ROWS; row++) {
        float* to = y + row * out;
        float last[N * LANES];
        float* whole = width == N * LANES ? to : last;
        if (width < N * LANES && add) std::memcpy(last, to, width * sizeof(float));
        for (int v = 0; v < N; v++) {
            float* at = whole + v * LANES;
            store(at, add ? load(at) + sums[row][v] : sums[row][v]);
        }
        if (width < N * LANES) std::memcpy(to, last, width * sizeof(float));
    }
}

// As tile, for any number of rows.
template <int N>
static void columns(Rows x, int64_t rows, int64_t in, const float* weights, int64_t stride, float* y, int64_t out, int64_t width,
                    bool add) {
    if (rows <= 0) return;
    // Blocks of about one size: 8 rows as 4 and 4, not as 6 and 2.
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK, size = (rows + blocks - 1) / blocks;
    for (int64_t row = 0; row < rows; row += size, x.at += size * x.row, y += size * out) {
        switch (std::min(size, rows - row)) {
            case 1: tile<1, N>(x, in, weights, stride, y, out, width, add); break;
            case 2: tile<2, N>(x, in, weights, stride, y, out, width, add); break;
            case 3: tile<3, N>(x, in, weights, stride, y, out, width, add); break;
            case 4: tile<4, N>(x, in, weights, stride, y, out, width, add); break;
            case 5: tile<5, N>(x, in, weights, stride, y, out, width, add); break;
            default: tile<6, N>(x, in, weights, stride, y, out, width, add);
        }
    }
}

static void product(const float* x, int64_t rows, int64_t in, int64_t out, const float* packed, float* y, bool add) {
    for (int64_t from = 0; from < out; from += PANEL)
        columns<VECTORS>({x, in, 1}, rows, in, packed + from * in, PANEL, y + from, out, std::min(PANEL, out - from), add);
}

// exp to about 1e-7, relative, and 0 below exp(-87): 2**n * exp(r) with r in [-ln 2 / 2, ln 2 / 2], the latter by its series.
static inline vec exponential(vec given) {
    const float rounder = 12582912.0f;  // 1.5 * 2**23: adding it leaves whole numbers
    const vec low = vec{} - 87.0f, high = vec{} + 88.0f;
    vec x = given < low ? low : given;
    x = x > high ? high : x;
    const vec n = (x * 1.44269504f + rounder) - rounder;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec sum = vec{} + 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec scale;
    std::memcpy(&scale, &power, sizeof scale);
    return given < low ? vec{} : sum * scale;
}

// silu(gate) * up, [rows, 2 * inner] to [rows, inner].
static void gated(const float* gate_up, int64_t rows, int64_t inner, float* to) {
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * inner, *up = gate + inner;
        float* result = to + row * inner;
        int64_t at = 0;
        for (; at + LANES <= inner; at += LANES) {
            const vec g = load(gate + at);
            store(result + at, g * load(up + at) / (1.0f + exponential(vec{} - g)));
        }
        for (; at < inner; at++) result[at] = gate[at] * up[at] / (1.0f + std::exp(-gate[at]));
    }
}

// Of vectors of a whole number of lanes.
static inline float dot(const float* a, const float* b, int64_t count) {
    vec sums = load(a) * load(b);
    for (int64_t at = LANES; at < count; at += LANES) sums += load(a + at) * load(b + at);
    quarter parts[LANES / 4];
    std::memcpy(parts, &sums, sizeof sums);
    for (int size = LANES / 8; size > 0; size /= 2)
        for (int part = 0; part < size; part++) parts[part] += parts[part + size];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

static float largest(const float* x, int64_t count) {
    float most = x[0];
    int64_t at = 0;
    if (count >= LANES) {
        vec best = load(x);
        for (; at + LANES <= count; at += LANES) {
            const vec next = load(x + at);
            best = next > best ? next : best;
        }
        for (int lane = 0; lane < LANES; lane++) most = std::max(most, best[lane]);
    }
    for (; at < count; at++) most = std::max(most, x[at]);
    return most;
}

// Probabilities [count] at a temperature above 0. Sums of a vector's length are float32, those of them float64.
static void probabilities(const float* logits, int64_t count, float temperature, float* to) {
    const float most = largest(logits, count), scale = 1.0f / temperature;
    double sum = 0;
    int64_t at = 0;
    while (at + LANES <= count) {
        vec sums = {};
        for (const int64_t end = std::min(count, at + 32 * LANES); at + LANES <= end; at += LANES) {
            const vec weight = exponential((load(logits + at) - most) * scale);
            store(to + at, weight);
            sums += weight;
        }
        for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    }
    for (; at < count; at++) sum += to[at] = std::exp((logits[at] - most) * scale);
    const float share = static_cast<float>(1.0 / sum);
    for (at = 0; at < count; at++) to[at] *= share;
}

// The index at which the cumulated weights pass `uniform` of their sum; never one of weight 0.
static int64_t drawn(const float* weights, int64_t count, double uniform) {
    double sum = 0, cumulated = 0;
    for (int64_t at = 0; at < count; at++) sum += weights[at];
    const double wanted = uniform * sum;
    int64_t last = 0;
    for (int64_t at = 0; at < count; at++) {
        if (weights[at] <= 0) continue;
        last = at;
        cumulated += weights[at];
        if (cumulated > wanted) return at;
    }
    return last;
}

struct Scratch {
    std::vector<float> gate_up, inner, rows, results, logits, queries, keys, scores;
    std::vector<int64_t> experts, order;
    static float* room(std::vector<float>& held, int64_t count) {
        if (static_cast<int64_t>(held.size()) < count) held.resize(count);
        return held.data();
    }
};

static thread_local Scratch scratch;

static void mlp(const float* x, int64_t rows, int64_t hidden, int64_t inner, const float* gate_up, const float* down, float* y) {
    float* both = Scratch::room(scratch.gate_up, rows * 2 * inner);
    float* between = Scratch::room(scratch.inner, rows * inner);
    product(x, rows, hidden, 2 * inner, gate_up, both, false);
    gated(both, rows, inner, between);
    product(between, rows, inner, hidden, down, y, false);
}

// weights [rows, seen], by `weights`, @ values [seen, width], rows of which are `token` apart, to [rows, width].
static void mix(Rows weights, int64_t rows, int64_t seen, const float* values, int64_t token, int64_t width, float* to) {
    int64_t at = 0;
    for (; at + PANEL <= width; at += PANEL)
        columns<VECTORS>(weights, rows, seen, values + at, token, to + at, width, PANEL, false);
    for (; at + 2 * LANES <= width; at += 2 * LANES)
        columns<2>(weights, rows, seen, values + at, token, to + at, width, 2 * LANES, false);
    for (; at < width; at += LANES) columns<1>(weights, rows, seen, values + at, token, to + at, width, LANES, false);
}

// Attention of the queries [all, width] of one key/value head, `group` of which are of one row and share its mask.
static void attend_few(const float* q, int64_t all, int64_t width, const float* keys, const float* values, int64_t token,
                       int64_t seen, const float* mask, int64_t group, float* to) {
    float* scores = Scratch::room(scratch.scores, all * seen);
    for (int64_t key = 0; key < seen; key++)
        for (int64_t row = 0; row < all; row++)
            scores[row * seen + key] =
                dot(q + row * width, keys + key * token, width) + (mask ? mask[row / group * seen + key] : 0.0f);
    for (int64_t row = 0; row < all; row++) probabilities(scores + row * seen, seen, 1.0f, scores + row * seen);
    mix({scores, seen, 1}, all, seen, values, token, width, to);
}

// As attend_few, where queries fill vectors: scores lie by key, [seen, N vectors of queries].
template <int N>
static void attend_panel(const float* q, int64_t some, int64_t width, const float* keys, const float* values, int64_t token,
                         int64_t seen, const float* mask, int64_t group, int64_t first, float* to) {
    const int64_t padded = N * LANES;
    float *turned = Scratch::room(scratch.keys, width * padded), *scores = Scratch::room(scratch.scores, seen * padded);
    std::fill(turned, turned + width * padded, 0.0f);
    for (int64_t row = 0; row < some; row++)
        for (int64_t at = 0; at < width; at++) turned[at * padded + row] = q[row * width + at];
    columns<N>({keys, token, 1}, seen, width, turned, padded, scores, padded, padded, false);
    if (mask)
        for (int64_t row = 0; row < some; row++) {
            const float* added = mask + (first + row) / group * seen;
            for (int64_t key = 0; key < seen; key++)
                if (added[key] != 0.0f) scores[key * padded + row] += added[key];  // mostly it is 0
        }
    vec most[N], sums[N];
    for (int v = 0; v < N; v++) {
        most[v] = load(scores + v * LANES);
        for (int64_t key = 1; key < seen; key++) {
            const vec next = load(scores + key * padded + v * LANES);
            most[v] = next > most[v] ? next : most[v];
        }
        sums[v] = vec{};
        for (int64_t key = 0; key < seen; key++) {
            float* at = scores + key * padded + v * LANES;
            const vec weight = exponential(load(at) - most[v]);
            store(at, weight);
            sums[v] += weight;
        }
    }
    mix({scores, 1, padded}, some, seen, values, token, width, to);
    for (int64_t row = 0; row < some; row++) {
        const float share = 1.0f / sums[row / LANES][row % LANES];
        for (int64_t at = 0; at < width; at++) to[row * width + at] *= share;
    }
}

static void attend_many(const float* q, int64_t all, int64_t width, const float* keys, const float* values, int64_t token,
                        int64_t seen, const float* mask, int64_t group, float* to) {
    for (int64_t first = 0; first < all; first += PANEL) {
        const int64_t some = std::min(PANEL, all - first);
        auto panel = some <= LANES ? attend_panel<1> : some <= 2 * LANES ? attend_panel<2> : attend_panel<VECTORS>;
        panel(q + first * width, some, width, keys, values, token, seen, mask, group, first, to + first * width);
    }
}

extern "C" {

const char* eagle3_isa() { return NAME; }

// Floats that a packed matrix [in, out] takes.
int64_t eagle3_packed_size(int64_t in, int64_t out) { return in * panels(out) * PANEL; }

// Weights [in, out] of any strides into panels; columns that do not exist are zeros.
void eagle3_pack(const float* weights, int64_t in_stride, int64_t out_stride, int64_t in, int64_t out, float* packed) {
    for (int64_t panel = 0; panel < panels(out); panel++)
        for (int64_t k = 0; k < in; k++)
            for (int64_t column = panel * PANEL; column < (panel + 1) * PANEL; column++)
                *packed++ = column < out ? weights[k * in_stride + column * out_stride] : 0.0f;
}

// y [rows, out] = x [rows, in] @ weights, or += where `add`.
void eagle3_product(const float* x, int64_t rows, int64_t in, int64_t out, const float* packed, float* y, int64_t add) {
    product(x, rows, in, out, packed, y, add != 0);
}

// y [rows, hidden] = x / sqrt(mean(x ** 2) + eps) * weight.
void eagle3_norm(const float* x, int64_t rows, int64_t hidden, const float* weight, double eps, float* y) {
    for (int64_t row = 0; row < rows; row++, x += hidden, y += hidden) {
        vec squares = {};
        int64_t at = 0;
        for (; at + LANES <= hidden; at += LANES) squares += load(x + at) * load(x + at);
        double sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += squares[lane];
        for (; at < hidden; at++) sum += x[at] * x[at];
        const float scale = static_cast<float>(1.0 / std::sqrt(sum / hidden + eps));
        for (at = 0; at + LANES <= hidden; at += LANES) store(y + at, load(x + at) * scale * load(weight + at));
        for (; at < hidden; at++) y[at] = x[at] * scale * weight[at];
    }
}

// Numbers of a vector: attention wants heads of a multiple of them.
int64_t eagle3_lanes() { return LANES; }

// What queries attend to in a cache: y [rows, heads * width].
//
// queries: [rows, heads * width], rows `stride` numbers apart, with their positions; cache: of a layer, a row of 2 * stored * width
// numbers per token, keys first; the queries see the tokens from `start` to before `end`, and `mask` [rows, end - start] is
// added to their scores, or null.
void eagle3_attend(const float* queries, int64_t rows, int64_t stride, int64_t heads, int64_t stored, int64_t width,
                   const float* cache, int64_t start, int64_t end, const float* mask, float* y) {
    const int64_t group = heads / stored, seen = end - start, token = 2 * stored * width, all = rows * group;
    const float root = 1.0f / std::sqrt(static_cast<float>(width));
    float* q = Scratch::room(scratch.queries, 2 * all * width);
    float* attended = q + all * width;
    for (int64_t head = 0; head < stored; head++) {
        for (int64_t row = 0; row < rows; row++) {
            const float* from = queries + row * stride + head * group * width;
            for (int64_t at = 0; at < group * width; at++) q[row * group * width + at] = from[at] * root;
        }
        const float *keys = cache + start * token + head * width, *values = keys + stored * width;
        if (all <= FEW)
            attend_few(q, all, width, keys, values, token, seen, mask, group, attended);
        else
            attend_many(q, all, width, keys, values, token, seen, mask, group, attended);
        for (int64_t row = 0; row < rows; row++)
            std::memcpy(y + (row * stored + head) * group * width, attended + row * group * width,
                        group * width * sizeof(float));
    }
}

// SwiGLU, y [rows, hidden].
void eagle3_mlp(const float* x, int64_t rows, int64_t hidden, int64_t inner, const float* gate_up, const float* down, float* y) {
    mlp(x, rows, hidden, inner, gate_up, down, y);
}

// y [rows, hidden] = the shared expert of x, and the top_k experts of each row, which take it scaled by the sigmoid of their
// router logit. Packed experts lie one behind the other.
void eagle3_experts(const float* x, int64_t rows, int64_t hidden, int64_t inner, int64_t count, int64_t top_k, const float* router,
                    const float* shared_gate_up, const float* shared_down, const float* gate_ups, const float* downs, float* y) {
    mlp(x, rows, hidden, inner, shared_gate_up, shared_down, y);
    float* logits = Scratch::room(scratch.logits, rows * count);
    product(x, rows, hidden, count, router, logits, false);
    // The experts of every row, by falling logit; of equal ones the first.
    auto& chosen = scratch.experts;
    chosen.assign(rows * top_k, 0);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < top_k; k++) {
            int64_t best = -1;
            for (int64_t expert = 0; expert < count; expert++) {
                const auto before = chosen.begin() + row * top_k;
                if (std::find(before, before + k, expert) != before + k) continue;
                if (best < 0 || logits[row * count + expert] > logits[row * count + best]) best = expert;
            }
            chosen[row * top_k + k] = best;
        }
    float* gathered = Scratch::room(scratch.rows, rows * hidden);
    float* results = Scratch::room(scratch.results, rows * hidden);
    const int64_t first = eagle3_packed_size(hidden, 2 * inner), second = eagle3_packed_size(inner, hidden);
    auto& members = scratch.order;
    for (int64_t expert = 0; expert < count; expert++) {
        members.clear();
        for (int64_t entry = 0; entry < rows * top_k; entry++)
            if (chosen[entry] == expert) members.push_back(entry / top_k);
        if (members.empty()) continue;
        for (size_t member = 0; member < members.size(); member++) {
            const float score = 1.0f / (1.0f + std::exp(-logits[members[member] * count + expert]));
            const float* from = x + members[member] * hidden;
            for (int64_t at = 0; at < hidden; at++) gathered[member * hidden + at] = from[at] * score;
        }
        mlp(gathered, members.size(), hidden, inner, gate_ups + expert * first, downs + expert * second, results);
        for (size_t member = 0; member < members.size(); member++) {
            float* to = y + members[member] * hidden;
            for (int64_t at = 0; at < hidden; at++) to[at] += results[member * hidden + at];
        }
    }
}

// A token drawn from `logits` [count] at a temperature, and the probabilities [count] that it was drawn from.
void eagle3_draw(const float* logits, int64_t count, double temperature, const double* uniform, float* to, int64_t* token) {
    probabilities(logits, count, static_cast<float>(temperature), to);
    *token = drawn(to, count, *uniform);
}

// Rejection sampling of a chain (Leviathan et al., arXiv 2211.17192, algorithm 1). How many of its `drafted` tokens are
// accepted; `added`: the token that follows them. Rows of the target behind the first rejection are not looked at.
//
// logits: the target's, [drafted + 1, vocabulary]; tokens: target ids [drafted]; uniform: [drafted + 1].
// q: probabilities that the tokens were drawn from, [drafted, reach] over the draft vocabulary `targets` [reach] of target ids,
// and `ids` [drafted] the tokens in it; null: they were chosen greedily.
// kept: the weight that a rejected token keeps, of its probability, so that something is always left.
int64_t eagle3_accept(const float* logits, int64_t drafted, int64_t vocabulary, double temperature, const int64_t* tokens,
                      const int64_t* ids, const float* q, int64_t reach, const int64_t* targets, const double* uniform,
                      double kept, int64_t* added) {
    float* p = Scratch::room(scratch.logits, vocabulary);
    for (int64_t row = 0;; row++, logits += vocabulary) {
        probabilities(logits, vocabulary, static_cast<float>(temperature), p);
        if (row < drafted) {
            const float chance = p[tokens[row]] / (q ? q[row * reach + ids[row]] : 1.0f);
            if (uniform[row] < chance) continue;
            if (q) {
                for (int64_t at = 0; at < reach; at++) {
                    float& left = p[targets[at]];
                    const float before = left;
                    left = std::max(before - q[row * reach + at], 0.0f) + static_cast<float>(kept) * before;
                }
            } else {
                p[tokens[row]] *= static_cast<float>(kept);
            }
        }
        *added = drawn(p, vocabulary, uniform[drafted]);
        return row;
    }
}

}  // extern "C"
