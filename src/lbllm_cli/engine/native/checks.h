// What an entry of the library is given, checked before anything is read or written: kernels trust every size.
#pragma once
#include "lbllm_kernels.h"

namespace {

constexpr int32_t kLargestGroup = 256;  // sums of a group's levels are int16
constexpr int32_t kLargestHead = 256;   // a head's values lie in a buffer of this many
constexpr int64_t kLargest = INT32_MAX;

inline bool known(int32_t dtype) { return dtype == LBLLM_FLOAT32 || dtype == LBLLM_BFLOAT16; }

inline bool sizes(int32_t in_features, int32_t out_features, int32_t group_size, int32_t level_group) {
    const bool placed = level_group >= 0 && level_group % 16 == 0 && (level_group == 0 || group_size % 16 == 0);
    return in_features > 0 && out_features > 0 && group_size >= 4 && group_size <= kLargestGroup && group_size % 4 == 0 && placed;
}

inline bool good(const lbllm_weights* w) { return w && w->tiles && sizes(w->in_features, w->out_features, w->group_size, w->level_group); }

inline bool good(const lbllm_quantizer* q) {
    if (!q || q->tables < 0 || q->tables > 2 || q->size < 1) return false;
    for (int t = 0; t < (q->tables ? q->tables : 1); t++)
        if (q->top[t] < 1 || q->top[t] > 127 || q->zero[t] < 0 || q->zero[t] > q->top[t]) return false;
    return true;
}

// A quantizer whose steps are those of the weights' groups, or one per row.
inline bool fits(const lbllm_quantizer* q, const lbllm_weights& w) {
    return good(q) && (q->size == w.group_size || q->size >= w.in_features);
}

inline bool linear_of(const lbllm_weights& w, const lbllm_quantizer* q, int64_t in, int64_t out) {
    return good(&w) && fits(q, w) && w.in_features == in && w.out_features == out;
}

inline int32_t check(const lbllm_block* b) {
    if (!b || b->hidden < 1 || b->heads < 1 || b->kv_heads < 1 || b->heads % b->kv_heads || b->intermediate < 1 ||
        b->head_dim < 2 || b->head_dim % 2 || b->head_dim > kLargestHead)
        return LBLLM_BAD_BLOCK;
    const int64_t d = b->head_dim, queries = b->heads * d;
    if (!linear_of(b->qkv, b->qkv_input, b->hidden, queries + 2 * b->kv_heads * d) ||
        !linear_of(b->o, b->o_input, queries, b->hidden) ||
        !linear_of(b->gate_up, b->gate_up_input, b->hidden, 2 * static_cast<int64_t>(b->intermediate)) ||
        !linear_of(b->down, b->down_input, b->intermediate, b->hidden) || !b->attention_norm || !b->mlp_norm)
        return LBLLM_BAD_BLOCK;
    const lbllm_quantizer* cached[2] = {b->keys, b->values};
    for (const lbllm_quantizer* q : cached)
        if (!good(q) || q->size % 2 || q->size > kLargestHead) return LBLLM_BAD_QUANTIZER;
    return known(b->norm_dtype) ? LBLLM_OK : LBLLM_BAD_TYPE;
}

// Bytes of a record: groups of 4-bit codes, a bfloat16 step, a byte.
inline int64_t record_bytes(const lbllm_quantizer* q, int head_dim) {
    return static_cast<int64_t>((head_dim + q->size - 1) / q->size) * ((q->size + 1) / 2 + 3);
}

// Records of one kind: heads and rows that do not lie in each other.
inline bool apart(int64_t bytes, int64_t row_stride, int64_t head_stride, const lbllm_cache* c, int64_t count) {
    const int64_t own = (c->tokens + count) * bytes;
    return (c->kv_heads == 1 || head_stride >= own) && (c->rows == 1 || row_stride >= own);
}

// A cache that `count` new tokens of each row are appended to.
inline int32_t check(const lbllm_cache* c, const lbllm_block* b, int64_t rows, int64_t count) {
    if (!c || !c->keys || !c->values || c->tokens < 0 || c->tokens > kLargest - count) return LBLLM_BAD_CACHE;
    if (c->rows != rows || c->kv_heads != b->kv_heads) return LBLLM_BAD_CACHE;
    if (c->key_bytes != record_bytes(b->keys, b->head_dim) || c->value_bytes != record_bytes(b->values, b->head_dim))
        return LBLLM_BAD_CACHE;
    const bool whole = apart(c->key_bytes, c->key_row_stride, c->key_head_stride, c, count) &&
                       apart(c->value_bytes, c->value_row_stride, c->value_head_stride, c, count);
    return whole ? LBLLM_OK : LBLLM_BAD_CACHE;
}

inline bool good(const lbllm_rows* r) {
    return r && r->weight && (known(r->dtype) ? !r->scale : r->dtype == LBLLM_INT8 && r->scale);
}

inline int32_t check(const lbllm_model* m) {
    if (!m || !m->blocks || !m->norm || !m->frequencies || m->count < 1 || m->vocab < 1) return LBLLM_BAD_BLOCK;
    if (!good(&m->embedding) || !good(&m->head) || !known(m->norm_dtype)) return LBLLM_BAD_TYPE;
    for (int i = 0; i < m->count; i++) {
        const lbllm_block* b = m->blocks + i;
        if (const int32_t wrong = check(b)) return wrong;
        if (b->hidden != m->hidden || b->head_dim != m->head_dim) return LBLLM_BAD_BLOCK;
    }
    return LBLLM_OK;
}

inline bool good(const lbllm_sampling* s) {
    return s && s->temperature >= 0 && s->top_p >= 0 && s->top_p <= 1 && s->min_p >= 0 && s->min_p <= 1 && s->penalty > 0 &&
           s->top_k >= 0;
}

}  // namespace
