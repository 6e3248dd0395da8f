// Draws one token for each row of logits: runtime/sampling.py on the device (its filters in the same
// order, its noise bit for bit), with what is needed of float64 in float64.
//   VOCAB: tokens. WIDTH: logits a load. THREADS: block size. PARTS: blocks that share a row's logits
//   to find the largest; the last of them to end goes on alone. Grid: PARTS blocks a row.
// tokens [rows]: the token. largest [rows]: the largest logit, for the host to refuse NaN and inf.
// history: from a row's history_start on the tokens that the repetition penalty is for, then those that
// were generated, ascending, and how often each was. Where `ahead` is set, the last token of the
// row's sequence is not among them: it is token_ids[logit_rows[row]], what the step began with. seen: a
// bit a token of the former, then of the latter, [rows, 2, ceil(VOCAB / 32)], scratch. bests
// [rows, PARTS]: scratch. arrived: an int a row, zero before and after.
#include "common.cuh"

struct Params {
    double temperature, top_p, min_p;
    u64 seed, position;
    int top_k;
    float penalty, frequency, presence;
    int history_start, history_len, generated, ahead;
};

#define LOADS 4  // a thread has under way
#define PACKS (VOCAB / WIDTH)
#define SHARE ((PACKS + PARTS - 1) / PARTS)  // of a block
#define SEEN_WORDS ((VOCAB + 31) / 32)
#define MASS_SCALE 35184372088832.0  // 2^45: sums of 2^18 weights of at most 1 fit 63 bits

// Order-preserving map of floats to integers.
DEVICE u32 ordered(float x) {
    const u32 bits = __float_as_uint(x + 0.0f);  // minus zero becomes zero
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE void philox(u32 (&c)[4], u64 seed) {
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const u32 h0 = __umulhi(0xD2511F53u, c[0]), l0 = 0xD2511F53u * c[0];
        const u32 h1 = __umulhi(0xCD9E8D57u, c[2]), l1 = 0xCD9E8D57u * c[2];
        c[0] = h1 ^ c[1] ^ k0, c[1] = l1, c[2] = h0 ^ c[3] ^ k1, c[3] = l0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

struct Row {
    const T* logits;
    const u32* seen;  // null where nothing is penalised
    float penalty, frequency, presence;
    const int* counted;  // tokens, then how often each was generated
    int generated, last;  // how many, and one token more

    DEVICE static bool has(const u32* bits, int token) {
        return bits[token / 32] >> (token % 32) & 1;
    }
    DEVICE int count(int token) const {
        int low = 0;
        for (int high = generated; low < high;) {
            const int middle = (low + high) / 2;
            if (counted[middle] < token) low = middle + 1;
            else high = middle;
        }
        const bool found = low < generated && counted[low] == token;
        return (found ? counted[generated + low] : 0) + (token == last);
    }
    DEVICE float score(int token) const {
        float x = to_float(logits[token]);
        if (!seen) return x;
        if (has(seen, token)) x = x < 0 ? x * penalty : x / penalty;
        // Nothing to be fused: the host rounds after each operation.
        if (has(seen + SEEN_WORDS, token))
            x = __fsub_rn(x, __fadd_rn(__fmul_rn(frequency, (float)count(token)), presence));
        return x;
    }
};

DEVICE void mark_one(u32* bits, int token) {
    if (token < VOCAB) atomicOr(bits + token / 32, 1u << token % 32);
}

// Sets the bits of `tokens`.
DEVICE void mark(u32* bits, const int* tokens, int count) {
    for (int i = threadIdx.x; i < count; i += THREADS) mark_one(bits, tokens[i]);
}

// The best of the block's (value, token): the largest, of equals the lowest token. NaN is largest.
template <typename V>
DEVICE void block_best(V& value, int& token) {
    __shared__ V values[THREADS / 32];
    __shared__ int ids[THREADS / 32];
    auto better = [](V a, int i, V b, int j) {
        if (i < 0 || j < 0) return i >= 0;
        const bool a_nan = a != a, b_nan = b != b;
        if (a_nan || b_nan) return a_nan && (!b_nan || i < j);
        return a > b || (a == b && i < j);
    };
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
        const V other = __shfl_xor_sync(FULL_WARP, value, offset);
        const int id = __shfl_xor_sync(FULL_WARP, token, offset);
        if (better(other, id, value, token)) value = other, token = id;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value, ids[threadIdx.x / 32] = token;
    __syncthreads();
    value = values[0], token = ids[0];
    for (int i = 1; i < THREADS / 32; i++)
        if (better(values[i], ids[i], value, token)) value = values[i], token = ids[i];
}

struct Best {
    float value;
    int token;
};

// Leaves a part's best with those of the row's others. Returns whether the block is the last of them;
// then the best is the row's.
DEVICE bool join_parts(Best& best, Best* parts, int part, int* arrived) {
#if PARTS > 1
    __shared__ bool last;
    if (threadIdx.x == 0) {
        parts[part] = best;
        __threadfence();
        last = atomicAdd(arrived, 1) == PARTS - 1;
        if (last) *arrived = 0;
        __threadfence();
    }
    __syncthreads();
    if (!last) return false;
    best.token = -1;
    if (threadIdx.x < PARTS) {
        const int2 bits = __ldcg((const int2*)parts + threadIdx.x);
        best = {__int_as_float(bits.x), bits.y};
    }
    block_best(best.value, best.token);
#endif
    return true;
}

// The key of the k-th largest score: a radix descent over the ordered keys, 8 bits at a time.
DEVICE u32 kth_largest(const Row& row, int k, u64* histogram) {
    u32 prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += THREADS) histogram[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < VOCAB; i += THREADS) {
            const u32 key = ordered(row.score(i));
            if (shift == 24 || key >> (shift + 8) == prefix)
                atomicAdd(histogram + (key >> shift & 255), 1ull);
        }
        __syncthreads();
        int digit = 255;
        for (; digit > 0 && (u64)k > histogram[digit]; digit--) k -= (int)histogram[digit];
        prefix = prefix << 8 | digit;
        __syncthreads();
    }
    return prefix;
}

struct Kept {
    u32 bound;  // keys below are dropped (top-k)
    u32 nucleus;  // keys below are dropped (top-p)
    int tie;  // of the keys equal to `nucleus`, tokens below are dropped
    float largest;
    double temperature;

    DEVICE double scaled(float score) const {
        return ((double)score - (double)largest) / temperature;
    }
    DEVICE bool has(float score, u32 key, int token) const {
        return score > -INFINITY && key >= bound && (key > nucleus || (key == nucleus && token >= tie));
    }
};

DEVICE u64 mass(const Kept& kept, float score) {
    return (u64)llrint(exp(kept.scaled(score)) * MASS_SCALE);
}

// Sets the nucleus: the least likely tokens whose mass together is at most (1 - top_p) of all are
// dropped, of equally likely ones the lowest first; one is always kept. Sums are in fixed point,
// so they do not depend on the order of the atomics.
DEVICE void find_nucleus(Kept& kept, const Row& row, double top_p, u64* histogram) {
    __shared__ u64 total;
    __shared__ int found;
    u32 prefix = 0;
    u64 below = 0, removed = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += THREADS) histogram[i] = 0;
        if (threadIdx.x == 0) total = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < VOCAB; i += THREADS) {
            const float score = row.score(i);
            const u32 key = ordered(score);
            if (!(score > -INFINITY) || key < kept.bound) continue;
            if (shift < 24 && key >> (shift + 8) != prefix) continue;
            // Weights that round to no mass are in no bin: they are dropped before all others.
            if (const u64 m = mass(kept, score)) atomicAdd(histogram + (key >> shift & 255), m);
        }
        __syncthreads();
        if (shift == 24) {
            if (threadIdx.x == 0)
                for (int i = 0; i < 256; i++) total += histogram[i];
            __syncthreads();
            removed = (u64)((1.0 - top_p) * (double)total);
        }
        int digit = 0, last = 0;
        for (int i = 0; i < 256; i++)
            if (histogram[i]) last = i;
        for (; digit < last && below + histogram[digit] <= removed; digit++) below += histogram[digit];
        prefix = prefix << 8 | digit;
        __syncthreads();
    }
    kept.nucleus = prefix;
    // Of the tokens with this very key, the first `drop` are dropped, but never all of them.
    int count = 0, drop = -1, id = 0;
    for (int start = 0; start < VOCAB; start += THREADS) {
        const int i = start + threadIdx.x;
        const float score = i < VOCAB ? row.score(i) : -INFINITY;
        const bool equal = i < VOCAB && ordered(score) == prefix;
        count += __syncthreads_count(equal);
        if (equal && drop < 0) drop = (int)min((removed - below) / mass(kept, score), (u64)VOCAB);
    }
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    if (drop >= 0) atomicMax(&found, drop);
    __syncthreads();
    drop = min(found, count - 1);
    __syncthreads();
    if (drop > 0) {
        int before = 0;
        for (int start = 0; start < VOCAB; start += THREADS) {
            const int i = start + threadIdx.x;
            const bool equal = i < VOCAB && ordered(row.score(i)) == prefix;
            const int here = __syncthreads_count(equal);
            if (drop >= before && drop < before + here) {
                if (threadIdx.x == 0) {
                    int rank = before;
                    for (id = start;; id++)
                        if (ordered(row.score(id)) == prefix && rank++ == drop) break;
                    found = id;
                }
            }
            before += here;
        }
        __syncthreads();
        kept.tie = found;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
sample(int* tokens, float* largest, const T* logits, const Params* params, const int* history,
       const int* token_ids, const int* logit_rows, u32* seen, Best* bests, int* arrived) {
    __shared__ u64 histogram[256];
    let_next_start();
    wait_for_previous();
    const int index = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
    const Params p = params[index];
    const int* const own = history + p.history_start;
    const int last = p.ahead ? token_ids[logit_rows[index]] : -1;
    Row row{logits + (size_t)index * VOCAB, nullptr, p.penalty, p.frequency, p.presence,
            own + p.history_len, p.generated, last};
    const bool penalised = p.history_len > 0 || p.generated > 0 || p.ahead;
    Best best{0, -1};
    auto take = [&](float x, int id) {
        if (best.token < 0 || (!(x <= best.value) && best.value == best.value)) best = {x, id};
    };
    if (!penalised) {
        const Pack<WIDTH>* packs = (const Pack<WIDTH>*)row.logits;
        const int end = min((part + 1) * SHARE, PACKS);
        // Several loads at a time: one after another they would take most of the time.
#pragma unroll 1
        for (int first = part * SHARE + threadIdx.x; first < end; first += LOADS * THREADS) {
            Pack<WIDTH> loaded[LOADS];
#pragma unroll
            for (int l = 0; l < LOADS; l++)
                if (first + l * THREADS < end) loaded[l] = packs[first + l * THREADS];
#pragma unroll
            for (int l = 0; l < LOADS; l++) {
                const int i = first + l * THREADS;
                if (i >= end) break;
#pragma unroll
                for (int j = 0; j < WIDTH; j++) take(to_float(loaded[l].v[j]), i * WIDTH + j);
            }
        }
        block_best(best.value, best.token);
    }
    if (!join_parts(best, bests + index * PARTS, part, arrived + index)) return;
    if (penalised) {
        u32* bits = seen + (size_t)index * 2 * SEEN_WORDS;
        for (int i = threadIdx.x; i < 2 * SEEN_WORDS; i += THREADS) bits[i] = 0;
        __syncthreads();
        mark(bits, own, p.history_len);
        mark(bits + SEEN_WORDS, row.counted, p.generated);
        if (p.ahead && threadIdx.x == 0) {
            if (p.penalty != 1.0f) mark_one(bits, last);
            if (p.frequency != 0.0f || p.presence != 0.0f) mark_one(bits + SEEN_WORDS, last);
        }
        __syncthreads();
        row.seen = bits;
#pragma unroll 1
        for (int i = threadIdx.x; i < VOCAB; i += THREADS) take(row.score(i), i);
        block_best(best.value, best.token);
    }
    if (threadIdx.x == 0) tokens[index] = best.token, largest[index] = best.value;
    if (p.temperature == 0.0 || !(fabsf(best.value) < INFINITY)) return;
    Kept kept{0, 0, 0, best.value, p.temperature};
    if (p.top_k > 0 && p.top_k < VOCAB) kept.bound = kth_largest(row, p.top_k, histogram);
    if (p.top_p < 1.0) find_nucleus(kept, row, p.top_p, histogram);
    double highest = 0;
    int token = -1;
    for (int i = threadIdx.x; i < (VOCAB + 3) / 4; i += THREADS) {
        u32 words[4] = {(u32)i, (u32)p.position, (u32)(p.position >> 32), 0};
        philox(words, p.seed);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int id = 4 * i + j;
            if (id >= VOCAB) break;
            const float score = row.score(id);
            if (!kept.has(score, ordered(score), id)) continue;
            const double scaled = kept.scaled(score);
            if (p.min_p > 0.0 && !(exp(scaled) >= p.min_p)) continue;
            const double uniform = ((double)words[j] + 0.5) * 2.3283064365386963e-10;  // 2^-32
            const double value = scaled - log(-log(uniform));
            if (token < 0 || value > highest) highest = value, token = id;
        }
    }
    block_best(highest, token);
    if (threadIdx.x == 0) tokens[index] = token;
}
