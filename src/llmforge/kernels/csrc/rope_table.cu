// Cosines and sines of each token's rotation angles: out [tokens, DIM] float32, the DIM / 2 cosines
// first. `frequencies` [DIM / 2] are those of the plain or stretched rope. Where they depend on the
// longer of the prompt and the token's own position (RopeConfig.frequencies): with DYNAMIC the base
// grows with it, with LONGROPE a second DIM / 2 frequencies hold beyond `original`.
// Grid: one block a token; DIM / 2 threads.
#include "common.cuh"

extern "C" __global__ void
rope_table(float* out, const int* positions, const int* query_starts, const int* prompt_lens,
           const float* frequencies, int sequences, float attention_factor, double theta,
           double factor, int original) {
    let_next_start();
    wait_for_previous();
    const int token = blockIdx.x, i = threadIdx.x;
    const int position = positions[token];
    float frequency = frequencies[i];
#if DYNAMIC || LONGROPE
    const int prompt = prompt_lens[sequence_of(query_starts, sequences, token)];
    const int length = max(prompt, position + 1);
#endif
#if LONGROPE
    if (length > original) frequency = frequencies[DIM / 2 + i];
#endif
#if DYNAMIC
    if (length > original) {
        const double stretch = factor * length / original - (factor - 1);
        const double base = theta * pow(stretch, (double)DIM / (DIM - 2));
        frequency = (float)pow(base, -2.0 * i / DIM);
    }
#endif
    const float angle = (float)position * frequency;
    out[(size_t)token * DIM + i] = cosf(angle) * attention_factor;
    out[(size_t)token * DIM + DIM / 2 + i] = sinf(angle) * attention_factor;
}
