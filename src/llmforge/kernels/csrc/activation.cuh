// activation(x) in float32, chosen by -D ACTIVATION_SILU, _GELU, _GELU_TANH, _RELU or _RELU2.
#pragma once

DEVICE float activation(float x) {
#if defined(ACTIVATION_SILU)
#if defined(DTYPE_FLOAT32)
    return x / (1.0f + expf(-x));
#else
    return __fdividef(x, 1.0f + __expf(-x));  // far less code, exact to far more than 16 bits
#endif
#elif defined(ACTIVATION_GELU)
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
#elif defined(ACTIVATION_GELU_TANH)
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
#elif defined(ACTIVATION_RELU)
    return fmaxf(x, 0.0f);
#elif defined(ACTIVATION_RELU2)
    const float positive = fmaxf(x, 0.0f);
    return positive * positive;
#else
    return x;
#endif
}
