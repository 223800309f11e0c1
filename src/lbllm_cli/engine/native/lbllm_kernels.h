// C ABI of the CPU kernels: what `lbllm_cli.engine.abi` calls through ctypes. No torch headers, no state but the chosen tier.
//
// Weights are the W(1+1) format of `format/weights.py`, repacked once at load (layout.h). Inputs are quantized as in
// `format/activations.py`: x = d * (T - Z), T an integer in 0..127, d and Z per token and group. Then
//
//     y[r] = bias[r] + sum over groups of d * scale[r, g] * (dot(level[r, g, code], T) - Z * sum(level[r, g, code]))
//
// where the dot product is exact in integers.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define LBLLM_EXPORT extern "C" __declspec(dllexport)
#else
#define LBLLM_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum { LBLLM_FLOAT32 = 0, LBLLM_BFLOAT16 = 1, LBLLM_INT8 = 2 };  // element types; of inputs and outputs the first two

// What an entry returns: 0, or what is wrong with what it was given; nothing is read or written then. Buffers are as large as
// the sizes beside them say: that is the caller's to see to.
enum { LBLLM_OK = 0, LBLLM_BAD_SIZE = 1, LBLLM_BAD_TYPE = 2, LBLLM_BAD_QUANTIZER = 3, LBLLM_BAD_BLOCK = 4, LBLLM_BAD_CACHE = 5,
       LBLLM_BAD_TOKEN = 6, LBLLM_NOT_FINITE = 7 };

// One linear, or several that read the same input, one below the other.
typedef struct {
    const uint8_t* tiles;  // lbllm_tiles_bytes() of them, aligned to 64
    const float* bias;     // [out_features], or NULL
    int32_t in_features, out_features, group_size;
    // 0: a group has its levels and its scale. Else how many inputs share levels, which come out of the table of
    // format/level_table.py; a row has one scale, and group_size is of the inputs that share a step. Both are multiples of 16 then.
    int32_t level_group;
} lbllm_weights;

// An activation quantizer. tables: 1 or 2, static; 0: uniform, whose Z is as dynamic as its step.
typedef struct {
    int32_t tables, size;       // size: values that share a step
    int32_t top[2], zero[2];    // largest T of a table, its Z
    float clip[2][2];           // share of a group's largest positive and largest negative value that is represented
    int8_t lattice[2][128];     // T - Z of the level nearest to each lattice place; T alone in the uniform form
    uint8_t code[2][128];       // its code
    int8_t value[2][16];        // the same of each code of a 4-bit table
} lbllm_quantizer;

// A decoder block of the Llama family: norms before attention and MLP, SiLU, rotary embedding, optional q/k norms and biases.
typedef struct {
    lbllm_weights qkv, o, gate_up, down;
    const lbllm_quantizer *qkv_input, *o_input, *gate_up_input, *down_input, *keys, *values;
    const void *attention_norm, *mlp_norm;  // [hidden], as the model has them
    const void *query_norm, *key_norm;      // [head_dim], or NULL
    const float* key_centre;                // [kv_heads, head_dim], what keys are quantized and attended to without, or NULL
    float epsilon, scaling;
    int32_t hidden, heads, kv_heads, head_dim, intermediate;
    int32_t norm_dtype;  // of the four norms
} lbllm_block;

// Records of keys or values (kv_cache.py): of token t of head h of row b at data + b * row_stride + h * head_stride + t * bytes.
typedef struct {
    uint8_t *keys, *values;
    int64_t key_row_stride, key_head_stride, value_row_stride, value_head_stride;
    int64_t tokens;      // of each row, before this step; there is room for the new ones
    const float* mask;   // [rows, tokens + 1], added to the scores, or NULL
    int64_t rows;
    int32_t kv_heads, key_bytes, value_bytes;  // of a record
} lbllm_cache;

// Rows of an embedding or a head.
typedef struct {
    const void* weight;     // [rows, width]
    const uint16_t* scale;  // float16 [rows], as its bits, of int8 weights; NULL of others
    int32_t dtype;
} lbllm_rows;

// A model of such blocks, whose streams are float32.
typedef struct {
    const lbllm_block* blocks;
    lbllm_rows embedding, head;    // [vocab, hidden]
    const void* norm;              // [hidden], of norm_dtype
    const float* frequencies;      // [head_dim / 2] of the rotary embedding, radians per position
    float amplitude;               // of its cosine and sine
    float epsilon;                 // of the last norm
    int32_t count, vocab, hidden, head_dim, norm_dtype;  // count: of blocks
} lbllm_model;

// How a token is drawn from logits, in this order: penalty, temperature, top_k, top_p, min_p.
typedef struct {
    float temperature;  // 0: the likeliest token, the first one on a tie
    float top_p;        // the fewest tokens whose chances reach this much; 1: all
    float min_p;        // tokens with at least this share of the likeliest one's chance; 0: all
    float penalty;      // logits of tokens that were there are divided by it where they are positive, else multiplied; 1: none
    int32_t top_k;      // 0: all
} lbllm_sampling;

// Version of this ABI. Python refuses a library of another one.
LBLLM_EXPORT int32_t lbllm_abi(void);
// Name of the tier in use: portable, avx2, avxvnni or avx512.
LBLLM_EXPORT const char* lbllm_tier(void);
// Chooses a tier by name. 0, or -1 when this library or this CPU does not have it.
LBLLM_EXPORT int32_t lbllm_choose_tier(const char* name);

// Bytes of a repacked linear, or -1 for sizes that there are not.
LBLLM_EXPORT int64_t lbllm_tiles_bytes(int32_t in_features, int32_t out_features, int32_t group_size, int32_t level_group);
// Repacks weight uint8 [out, groups, size / 4], levels int8 [out, groups, 4], scale float16 [out, groups] (as its bits), in groups of
// `size` inputs: level_group, or group_size where that is 0.
LBLLM_EXPORT int32_t lbllm_pack(const uint8_t* weight, const int8_t* levels, const uint16_t* scale, int32_t in_features,
                                int32_t out_features, int32_t group_size, int32_t level_group, uint8_t* tiles, int32_t threads);
// Its inverse for rows first .. first + count.
LBLLM_EXPORT int32_t lbllm_unpack(const lbllm_weights* weights, int32_t first, int32_t count, uint8_t* weight, int8_t* levels,
                                  uint16_t* scale);

// Quantizes x [rows, width], every row cut into groups: lattice places uint8 and values d * (T - Z) float [rows, width], either
// NULL where it is not wanted; steps float, rounded to step_dtype, zeros and tables taken int32 [rows, groups].
LBLLM_EXPORT int32_t lbllm_quantize(const lbllm_quantizer* quantizer, const void* x, int32_t dtype, int64_t rows, int32_t width,
                                    uint8_t* places, float* values, float* steps, int32_t* zeros, int32_t* tables,
                                    int32_t step_dtype, int32_t threads);
// What the gradient of values [groups, quantizer->size] is made of (runtime/torch/quantizer.py), x, values, steps, zeros and tables being
// those of lbllm_quantize. inputs float [groups, size], or NULL: the gradient where x lies within half a step of the table, else
// 0. sums float [groups, 3], or NULL: of gradient * (value - x) over those, of gradient * value over x above, and below.
LBLLM_EXPORT int32_t lbllm_quantize_backward(const lbllm_quantizer* quantizer, const void* x, int32_t dtype, int64_t groups,
                                             const float* values, const float* steps, const int32_t* zeros,
                                             const int32_t* tables, const float* gradient, float* inputs, float* sums,
                                             int32_t threads);
// y [rows, out] = quantized x [rows, in] times the weights. A step per weight group, or one per row (quantizer->size >= in).
// quantizer NULL: x as it is, in float32 arithmetic.
LBLLM_EXPORT int32_t lbllm_linear(const lbllm_weights* weights, const lbllm_quantizer* quantizer, const void* x, void* y,
                                  int32_t dtype, int64_t rows, int32_t threads);
// One new token per row through a block: hidden [rows, hidden] in and out, cosine and sine [rows, head_dim] of its position.
// Its key and value are appended to the cache's records.
LBLLM_EXPORT int32_t lbllm_block_step(const lbllm_block* block, const lbllm_cache* cache, const void* in, void* out,
                                      const void* cosine, const void* sine, int32_t dtype, int64_t rows, int32_t threads);
// Tokens [count] through a model, behind those that its caches [model->count] hold, of one row and without masks: their keys and
// values are appended, for which there is room. logits float [vocab] of what follows the last one, or NULL.
LBLLM_EXPORT int32_t lbllm_run(const lbllm_model* model, const lbllm_cache* caches, const int32_t* tokens, int64_t count,
                               float* logits, int32_t threads);
// Draws the next token from logits [vocab], which are written over. before [count]: tokens that were there. state: of the random
// numbers, any number to begin with. What is not finite cannot be drawn from: LBLLM_NOT_FINITE.
LBLLM_EXPORT int32_t lbllm_sample(const lbllm_sampling* sampling, float* logits, int32_t vocab, const int32_t* before,
                                  int64_t count, uint64_t* state, int32_t* token);
// y [rows, out] = x [rows, in] times weights [out, in]: the head of a model, for few rows.
LBLLM_EXPORT int32_t lbllm_head(const lbllm_rows* weight, const void* x, void* y, int32_t in_features, int64_t out_features,
                                int32_t dtype, int64_t rows, int32_t threads);
// Reads `bytes` of memory as fast as the tier can; returns their sum modulo 2^64, so that it cannot be left out.
LBLLM_EXPORT uint64_t lbllm_read(const uint8_t* data, int64_t bytes, int32_t threads);
