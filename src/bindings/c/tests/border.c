/* What a caller may do wrong is answered with a status and a message, and what it does right with numbers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dlf_engine.h"

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "line %d: %s (last error: %s)\n", __LINE__, #condition, dlf_last_error());       \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

/* The call fails with this status and a message that holds this text. */
#define FAILS(call, expected, text)                                                                          \
    do {                                                                                                     \
        const dlf_status status_ = (call);                                                                   \
        if (status_ != (expected) || strstr(dlf_last_error(), (text)) == NULL) {                             \
            fprintf(stderr, "line %d: status %d, %s\n", __LINE__, (int)status_, dlf_last_error());           \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

enum { VOCAB_SIZE = 2000, STRIDE = 2048, ROWS = 3 };

static void fusion(void) {
    static float values[3][ROWS * STRIDE];
    for (int model = 0; model < 3; model++) {
        for (int i = 0; i < ROWS * STRIDE; i++) {
            values[model][i] = i % STRIDE < VOCAB_SIZE ? (float)((i * 37 + model * i % 11) % 101) / 20.0f : NAN;
        }
    }
    const float *const experts[] = {values[2]};
    dlf_logits logits = {values[0], values[1], experts, 1, ROWS, VOCAB_SIZE, STRIDE};
    dlf_fuser *fuser = NULL;
    CHECK(dlf_fuser_new(2, &fuser) == DLF_OK && fuser != NULL);
    dlf_decision decisions[ROWS];

    /* alpha is on the paper's grid; the padding's NaN is never read. */
    CHECK(dlf_fuse(fuser, &logits, NULL, NULL, NULL, ROWS, decisions) == DLF_OK);
    for (int row = 0; row < ROWS; row++) {
        const double tenths = decisions[row].alpha[0] * 10.0;
        CHECK(decisions[row].status == DLF_OK && decisions[row].expert == 0);
        CHECK(fabs(tenths - round(tenths)) < 1e-9 && tenths > -0.5 && tenths < 19.5);
        CHECK(decisions[row].token < VOCAB_SIZE && decisions[row].logprob_fused < 0.0);
        CHECK(isnan(decisions[row].alpha[1]) && decisions[row].argmax_expert[1] == DLF_NO_TOKEN);
    }
    /* The small model for the expert, too: alpha 0 by the rule of ties, and the large model's own choice. */
    const float *const same[] = {values[1]};
    dlf_logits equal = logits;
    equal.experts = same;
    CHECK(dlf_fuse(fuser, &equal, NULL, NULL, NULL, ROWS, decisions) == DLF_OK);
    CHECK(decisions[1].alpha[0] == 0.0 && decisions[1].token == decisions[1].argmax_large);

    /* Fixed alpha, a given token, a held alpha. */
    const double alpha = 0.5;
    dlf_rule rule = dlf_rule_default();
    rule.method = DLF_STATIC;
    rule.alphas = &alpha;
    rule.num_alphas = 1;
    dlf_row row = dlf_row_default(2);
    row.forced = 7;
    CHECK(dlf_fuse(fuser, &logits, &rule, NULL, &row, 1, decisions) == DLF_OK);
    CHECK(decisions[0].token == 7 && decisions[0].alpha[0] == 0.5 && decisions[0].expert == DLF_NO_EXPERT);
    const double fixed = decisions[0].logprob_fused;
    row.held_expert = 0;
    row.held_alpha = 0.5;
    CHECK(dlf_fuse(fuser, &logits, NULL, NULL, &row, 1, decisions) == DLF_OK);
    CHECK(decisions[0].expert == 0 && decisions[0].logprob_fused == fixed);

    /* What is wrong. */
    FAILS(dlf_fuse(NULL, &logits, NULL, NULL, NULL, ROWS, decisions), DLF_INVALID_ARGUMENT, "fuser is null");
    FAILS(dlf_fuse(fuser, NULL, NULL, NULL, NULL, ROWS, decisions), DLF_INVALID_ARGUMENT, "logits is null");
    FAILS(dlf_fuse(fuser, &logits, NULL, NULL, NULL, ROWS, NULL), DLF_INVALID_ARGUMENT, "decisions is null");
    FAILS(dlf_fuse(fuser, &logits, NULL, NULL, NULL, 2, decisions), DLF_INVALID_ARGUMENT, "num_rows is 2");
    row.row = ROWS;
    FAILS(dlf_fuse(fuser, &logits, NULL, NULL, &row, 1, decisions), DLF_INVALID_ARGUMENT, "below 3, found 3");
    row.row = 0;
    row.held_expert = -7;
    FAILS(dlf_fuse(fuser, &logits, NULL, NULL, &row, 1, decisions), DLF_INVALID_ARGUMENT, "held_expert is -7");
    row.held_expert = DLF_NO_EXPERT;
    row.forced = VOCAB_SIZE;
    FAILS(dlf_fuse(fuser, &logits, NULL, NULL, &row, 1, decisions), DLF_INVALID_ARGUMENT, "token id 2000");
    CHECK(decisions[0].status == DLF_INVALID_ARGUMENT && decisions[0].token == DLF_NO_TOKEN);
    dlf_logits wrong = logits;
    wrong.small = NULL;
    FAILS(dlf_fuse(fuser, &wrong, NULL, NULL, NULL, ROWS, decisions), DLF_INVALID_ARGUMENT, "a small model");
    wrong = logits;
    wrong.stride = VOCAB_SIZE - 1;
    FAILS(dlf_fuse(fuser, &wrong, NULL, NULL, NULL, ROWS, decisions), DLF_INVALID_ARGUMENT, "stride");
    wrong = logits;
    wrong.rows = SIZE_MAX;
    FAILS(dlf_fuse(fuser, &wrong, NULL, NULL, NULL, ROWS, decisions), DLF_INVALID_ARGUMENT, "rows");
    wrong = logits;
    wrong.num_experts = DLF_MAX_EXPERTS + 1;
    FAILS(dlf_fuse(fuser, &wrong, NULL, NULL, NULL, ROWS, decisions), DLF_INVALID_ARGUMENT, "num_experts");
    rule.method = 99;
    FAILS(dlf_fuse(fuser, &logits, &rule, NULL, NULL, ROWS, decisions), DLF_INVALID_ARGUMENT, "method 99");
    dlf_sampling sampling = dlf_sampling_default();
    sampling.top_p = 0.0f;
    FAILS(dlf_fuse(fuser, &logits, NULL, &sampling, NULL, ROWS, decisions), DLF_INVALID_ARGUMENT, "top_p");
    const dlf_grid grid = {0.0, 2.0, 0.001, false};
    rule = dlf_rule_default();
    rule.grids = &grid;
    rule.num_grids = 1;
    FAILS(dlf_fuse(fuser, &logits, &rule, NULL, NULL, ROWS, decisions), DLF_INVALID_ARGUMENT, "alpha grid");

    /* A broken row leaves the others theirs. */
    values[0][STRIDE + 5] = NAN;
    FAILS(dlf_fuse(fuser, &logits, NULL, NULL, NULL, ROWS, decisions), DLF_NUMERIC, "row 1: the large model");
    CHECK(decisions[0].status == DLF_OK && decisions[1].status == DLF_NUMERIC && decisions[2].status == DLF_OK);
    CHECK(isnan(decisions[1].logprob_fused));
    dlf_fuser_free(fuser);
    dlf_fuser_free(NULL);
}

typedef struct {
    size_t tokens[2];
    size_t stop_after;
    char text[256];
    uint32_t finish;
} seen;

static bool count(const dlf_token *token, void *user_data) {
    seen *s = user_data;
    if (token->request == 0) {
        CHECK(strlen(s->text) + token->text_len < sizeof s->text);
        strcat(s->text, token->text);
        s->finish = token->finish;
    }
    CHECK(token->index == s->tokens[token->request] && token->decision->status == DLF_OK);
    s->tokens[token->request]++;
    return token->request == 0 || s->tokens[1] < s->stop_after;
}

static void generation(const dlf_engine *engine) {
    const char *text = "Question: Tom has 17 apples and buys 25 more. How many apples does Tom have?\nAnswer:";
    uint32_t ids[128];
    size_t len = 0;
    CHECK(dlf_tokenize(engine, text, strlen(text), true, ids, 128, &len) == DLF_OK && len > 10);
    const size_t needed = len;
    FAILS(dlf_tokenize(engine, text, strlen(text), true, ids, 3, &len), DLF_BUFFER_TOO_SMALL, "room for 3");
    CHECK(len == needed);
    FAILS(dlf_tokenize(engine, "\xff", 1, true, ids, 128, &len), DLF_INVALID_ARGUMENT, "UTF-8");
    char back[256];
    const dlf_tokens prompt = {ids, needed};
    CHECK(dlf_detokenize(engine, prompt, back, sizeof back, &len) == DLF_OK && strcmp(back, text) == 0);
    CHECK(len == strlen(text));
    FAILS(dlf_detokenize(engine, prompt, back, len, &len), DLF_BUFFER_TOO_SMALL, "are needed");

    /* Two at once: the second is stopped by the callback after three tokens. */
    dlf_request requests[2] = {dlf_request_default(), dlf_request_default()};
    for (int i = 0; i < 2; i++) {
        requests[i].prompts = &prompt;
        requests[i].num_prompts = 1;
        requests[i].max_new_tokens = 24;
    }
    requests[1].ignore_eos = true;
    seen both = {.stop_after = 3};
    CHECK(dlf_generate(engine, requests, 2, count, &both) == DLF_OK);
    CHECK(both.tokens[1] == 3 && both.finish != DLF_FINISH_NONE);
    CHECK(strstr(both.text, "42") != NULL);
    /* A stop string is no part of the text. */
    const char *const stop[] = {"42"};
    requests[0].stop = stop;
    requests[0].num_stop = 1;
    seen cut = {.stop_after = 3};
    CHECK(dlf_generate(engine, requests, 1, count, &cut) == DLF_OK);
    CHECK(cut.finish == DLF_FINISH_STOP && strstr(cut.text, "42") == NULL);

    /* Scores are those of generation with given tokens, and sum to a negative number. */
    dlf_decision *scores = calloc(needed, sizeof *scores);
    CHECK(scores != NULL && dlf_score(engine, NULL, prompt, scores) == DLF_OK);
    for (size_t i = 0; i + 1 < needed; i++) {
        CHECK(scores[i].token == ids[i + 1] && scores[i].logprob_fused <= 0.0 && !isnan(scores[i].alpha[0]));
    }
    free(scores);

    /* What is wrong. */
    FAILS(dlf_generate(engine, requests, 1, NULL, NULL), DLF_INVALID_ARGUMENT, "on_token is null");
    requests[1].num_prompts = 3;
    FAILS(dlf_generate(engine, requests, 2, count, &both), DLF_INVALID_ARGUMENT, "request 1: num_prompts");
    requests[1].num_prompts = 1;
    requests[1].max_new_tokens = 0;
    FAILS(dlf_generate(engine, requests, 2, count, &both), DLF_INVALID_ARGUMENT, "request 1: max_new_tokens");
    ids[0] = 0xFFFFFFF0u;
    FAILS(dlf_generate(engine, requests, 1, count, &both), DLF_INVALID_ARGUMENT, "token id 4294967280");
    const dlf_tokens none = {NULL, 0}, null = {NULL, 5};
    dlf_decision one;
    FAILS(dlf_score(engine, NULL, none, &one), DLF_INVALID_ARGUMENT, "at least 2, found 0");
    FAILS(dlf_score(engine, NULL, null, &one), DLF_INVALID_ARGUMENT, "ids is null");
}

int main(void) {
    puts(dlf_version());
    CHECK(strcmp(dlf_last_error(), "") == 0);
    fusion();

    dlf_engine *engine = NULL;
    const dlf_options bad = {"tpu", 0}, two = {"cpu", 2};
    FAILS(dlf_open_demo(&bad, &engine), DLF_INVALID_ARGUMENT, "device: expected auto, cpu");
    FAILS(dlf_open_demo(NULL, NULL), DLF_INVALID_ARGUMENT, "engine is null");
    const dlf_models nowhere = {"/nowhere/large", NULL, NULL, 0};
    FAILS(dlf_open(&nowhere, NULL, &engine), DLF_MODEL, "/nowhere/large");
    const dlf_models none = {NULL, NULL, NULL, 0};
    FAILS(dlf_open(&none, NULL, &engine), DLF_INVALID_ARGUMENT, "at least one model");
    CHECK(engine == NULL);
    CHECK(dlf_open_demo(&two, &engine) == DLF_OK);
    CHECK(dlf_vocab_size(engine) > 100 && dlf_num_experts(engine) == 2 && dlf_vocab_size(NULL) == 0);
    generation(engine);
    dlf_close(engine);
    dlf_close(NULL);
    puts("all held");
    return 0;
}
