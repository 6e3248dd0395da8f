// What the rows of gate and up of an expert become (model/ops.py, experts). LIMITED: gate and up are
// bounded, gate sigmoid(alpha gate) (up + 1); else activation(gate) up, as the gated op rounds.
#pragma once

DEVICE T expert_activation(float gate, float up, float alpha, float limit) {
#if LIMITED
    gate = fminf(gate, rounded(limit));
    up = fminf(fmaxf(up, -rounded(limit)), rounded(limit));
    const float open = rounded(1.0f / (1.0f + expf(-rounded(alpha * gate))));
    return from_float(rounded(gate * open) * rounded(up + 1.0f));
#else
    return from_float(rounded(activation(gate)) * up);
#endif
}
