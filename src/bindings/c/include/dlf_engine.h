/* dlf-engine: dynamic logits fusion. Generated from the Rust sources by cbindgen; docs/embedding.md shows its use. */

#ifndef DLF_ENGINE_H
#define DLF_ENGINE_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

// alpha by matching KL divergences, one expert active a step.
#define DLF_DYNAMIC 0

// Fixed alpha: proxy tuning.
#define DLF_STATIC 1

// The large model alone.
#define DLF_LARGE 2

// The small model alone.
#define DLF_SMALL 3

// One expert alone.
#define DLF_EXPERT 4

// The best candidate of the grid, as in the paper.
#define DLF_SEARCH_GRID 0

// The continuous minimum inside the best candidate's cells.
#define DLF_SEARCH_REFINE 1

// Both KL terms, as in the paper.
#define DLF_OBJECTIVE_BOTH 0

// Only KL(fused || large).
#define DLF_OBJECTIVE_FORWARD 1

// Only KL(large || fused).
#define DLF_OBJECTIVE_REVERSE 2

// The most experts of one ensemble.
#define DLF_MAX_EXPERTS 8

// No token.
#define DLF_NO_TOKEN 4294967295

// No expert.
#define DLF_NO_EXPERT -1

// The generation goes on.
#define DLF_FINISH_NONE 0

// An end token or a stop string.
#define DLF_FINISH_STOP 1

// `max_new_tokens`, or the end of a model's context.
#define DLF_FINISH_LENGTH 2

// How a call ended.
typedef enum dlf_status {
  // It did what it says.
  DLF_OK = 0,
  // An argument is null, out of its range, or not what the models take.
  DLF_INVALID_ARGUMENT = 1,
  // A model's files can't be read, or the models don't fit together.
  DLF_MODEL = 2,
  // Logits are NaN or +infinity, or no token is left to choose from.
  DLF_NUMERIC = 3,
  // The device can't be used, or its memory is too small.
  DLF_DEVICE = 4,
  // The buffer is too small; the size that is needed was written.
  DLF_BUFFER_TOO_SMALL = 5,
  // A bug of the library.
  DLF_INTERNAL = 6,
} dlf_status;

// An ensemble and where it runs. Nothing in it changes: any number of threads may use one at once.
typedef struct dlf_engine dlf_engine;

// Fuses logits of any engine: threads and working memory. One call at a time.
typedef struct dlf_fuser dlf_fuser;

// The candidates of alpha: start, start + step, ... up to stop; 1 to 32 of them.
typedef struct dlf_grid {
  // The first.
  double start;
  // The end.
  double stop;
  // More than 0.
  double step;
  // Whether `stop` is itself a candidate.
  bool inclusive;
} dlf_grid;

// How the models' logits become one distribution. Begin with `dlf_rule_default`.
typedef struct dlf_rule {
  // `DLF_DYNAMIC`, `DLF_STATIC`, `DLF_LARGE`, `DLF_SMALL` or `DLF_EXPERT`.
  uint32_t method;
  // `DLF_STATIC`: one alpha, or one for each expert; none is 1.0.
  const double *alphas;
  // How many.
  size_t num_alphas;
  // `DLF_EXPERT`: which, counted from 0.
  size_t expert;
  // `DLF_DYNAMIC`: one grid, or one for each expert; none is the paper's 0.0, 0.1, ... 1.9.
  const struct dlf_grid *grids;
  // How many.
  size_t num_grids;
  // `DLF_DYNAMIC`: `DLF_SEARCH_GRID` or `DLF_SEARCH_REFINE`.
  uint32_t search;
  // `DLF_DYNAMIC`: `DLF_OBJECTIVE_BOTH`, `DLF_OBJECTIVE_FORWARD` or `DLF_OBJECTIVE_REVERSE`.
  uint32_t objective;
  // `DLF_DYNAMIC`: alpha is sought every so many steps and held in between; at least 1. `dlf_fuse` goes by each
  // row's `held_expert` instead.
  size_t every;
} dlf_rule;

// Added to the logit of a token.
typedef struct dlf_bias {
  // The token.
  uint32_t token;
  // -infinity bans it.
  float bias;
} dlf_bias;

// How a token is drawn from the fused logits. Begin with `dlf_sampling_default`.
typedef struct dlf_sampling {
  // 0 is greedy.
  float temperature;
  // The k most probable tokens; 0 is all.
  size_t top_k;
  // The fewest most probable tokens whose probability reaches this; 1 is all.
  float top_p;
  // Tokens at least this fraction as probable as the most probable one; 0 is all.
  float min_p;
  // Divides positive logits and multiplies negative ones of tokens seen so far, prompt included; 1 is none.
  float repetition_penalty;
  // Subtracted from the logits of generated tokens.
  float presence_penalty;
  // Subtracted from the logits of generated tokens once for every time they were generated.
  float frequency_penalty;
  // `num_logit_biases` biases.
  const struct dlf_bias *logit_biases;
  // How many.
  size_t num_logit_biases;
  // The same seed gives the same text, whatever else is in the batch.
  uint64_t seed;
} dlf_sampling;

// Token ids: `len` of them.
typedef struct dlf_tokens {
  // May be null where `len` is 0.
  const uint32_t *ids;
  // How many.
  size_t len;
} dlf_tokens;

// One row to decide. Begin with `dlf_row_default`.
typedef struct dlf_row {
  // The row of the matrices.
  size_t row;
  // The step, counted from the first token after the prompt: it keys the noise of sampling and names errors.
  size_t step;
  // The active expert of an earlier search whose alpha is held, or `DLF_NO_EXPERT` to search.
  int32_t held_expert;
  // Its alpha.
  double held_alpha;
  // A token that is given and only scored, or `DLF_NO_TOKEN` to choose one.
  uint32_t forced;
  // The tokens before this one, prompt included, which penalties look at.
  struct dlf_tokens history;
  // How many of them were generated.
  size_t num_generated;
  // Tokens that must not be chosen.
  struct dlf_tokens banned;
} dlf_row;

// Logits of the models for the same rows, one matrix a model: `(rows, vocab_size)` f32, row-major, row `r` beginning
// at `r * stride`. They are read in place.
typedef struct dlf_logits {
  // The large model; null where the rule doesn't need it.
  const float *large;
  // The small model; null where the rule doesn't need it.
  const float *small;
  // One pointer an expert.
  const float *const *experts;
  // How many; at most `DLF_MAX_EXPERTS`.
  size_t num_experts;
  // Rows of each matrix.
  size_t rows;
  // The token ids that all models share.
  size_t vocab_size;
  // From row to row, in values; 0 is `vocab_size`.
  size_t stride;
} dlf_logits;

// What one step decided, and the numbers it decided by: log-probabilities and KL terms in nats, of the
// distributions at temperature 1. What the rule doesn't have is NaN, `DLF_NO_TOKEN` or `DLF_NO_EXPERT`; so are the
// entries past the last expert. A rule that runs one expert alone has its values in entry 0.
typedef struct dlf_decision {
  // `DLF_OK`, or why this row has no decision.
  enum dlf_status status;
  // The chosen token, or the one that was to be scored.
  uint32_t token;
  // The most probable token of the fused distribution.
  uint32_t argmax_fused;
  // The most probable token of the large model.
  uint32_t argmax_large;
  // The most probable token of each expert.
  uint32_t argmax_expert[DLF_MAX_EXPERTS];
  // The active expert of the dynamic rule.
  int32_t expert;
  // alpha of each expert.
  double alpha[DLF_MAX_EXPERTS];
  // The loss at that alpha.
  double loss;
  // KL(fused || large).
  double kl_fused_large;
  // KL(large || fused).
  double kl_large_fused;
  // KL(expert || small) of each expert.
  double kl_expert_small[DLF_MAX_EXPERTS];
  // KL(small || expert) of each expert.
  double kl_small_expert[DLF_MAX_EXPERTS];
  // log-probability of the token in the fused distribution, before penalties, temperature and truncation.
  double logprob_fused;
  // In the large model.
  double logprob_large;
  // In the small model.
  double logprob_small;
  // In each expert.
  double logprob_expert[DLF_MAX_EXPERTS];
} dlf_decision;

// The directories of an ensemble, in the Hugging Face layout. Models that the rules in use don't need may be null.
typedef struct dlf_models {
  // The large model.
  const char *large;
  // The small model.
  const char *small;
  // Fine-tuned small models, or LoRA adapters over the small one.
  const char *const *experts;
  // How many; at most `DLF_MAX_EXPERTS`.
  size_t num_experts;
} dlf_models;

// Where to compute.
typedef struct dlf_options {
  // "auto", "cpu", "cuda" or "cuda:N"; null is "auto".
  const char *device;
  // Threads of the CPU; 0 is one a core.
  size_t threads;
} dlf_options;

// What to decode. Begin with `dlf_request_default`.
typedef struct dlf_request {
  // One prompt for all models, or one each for large, small and the experts in order.
  const struct dlf_tokens *prompts;
  // How many.
  size_t num_prompts;
  // Tokens that follow the prompt as they are and are scored.
  struct dlf_tokens forced;
  // Null is the paper's rule.
  const struct dlf_rule *rule;
  // Null is greedy.
  const struct dlf_sampling *sampling;
  // Tokens to generate at most.
  size_t max_new_tokens;
  // Tokens to generate at least.
  size_t min_new_tokens;
  // Texts that end the generation and are not part of it.
  const char *const *stop;
  // How many.
  size_t num_stop;
  // Tokens that end the generation, besides the models' own.
  struct dlf_tokens stop_tokens;
  // Whether the generation goes on past end-of-sequence tokens.
  bool ignore_eos;
} dlf_request;

// One decided token. It and what it points to are valid during the callback.
typedef struct dlf_token {
  // Which request.
  size_t request;
  // Counted from the first token after the prompt.
  size_t index;
  // The token.
  uint32_t id;
  // Whether the request gave it.
  bool forced;
  // The text that may be shown now, UTF-8 with a NUL behind it. A character may need several tokens, and what may
  // begin a stop string is held back.
  const char *text;
  // Bytes of it, without the NUL behind it.
  size_t text_len;
  // How it was decided.
  const struct dlf_decision *decision;
  // `DLF_FINISH_NONE`, `DLF_FINISH_STOP` or `DLF_FINISH_LENGTH`.
  uint32_t finish;
} dlf_token;

// Called with each token on the thread that called `dlf_generate`. False ends the request whose token it is; the
// others go on.
typedef bool (*dlf_on_token)(const struct dlf_token *token, void *user_data);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// What went wrong in the last call of this thread that failed, as UTF-8; empty where none has. It is valid until
// another call of this thread fails.
const char *dlf_last_error(void);

// The library's version, such as "0.1.0". It is valid for ever.
const char *dlf_version(void);

// The paper's rule.
struct dlf_rule dlf_rule_default(void);

// Greedy.
struct dlf_sampling dlf_sampling_default(void);

// A row at step 0 that searches alpha and chooses a token.
struct dlf_row dlf_row_default(size_t row);

// Makes a fuser of `threads` threads, the caller's included; 0 is one a core. Decisions don't depend on their number.
enum dlf_status dlf_fuser_new(size_t threads,
                              struct dlf_fuser **fuser);

// Frees a fuser; null is nothing.
void dlf_fuser_free(struct dlf_fuser *fuser);

// Fuses rows of logits and chooses their tokens. No model is run.
//
// `rule` null is the paper's rule, `sampling` null is greedy, `rows` null is every row of the logits in order, where
// `num_rows` must be `logits->rows`. `decisions` has room for `num_rows`. A row that fails says so in its status and
// leaves the others theirs; the call then returns the status of the first that did.
enum dlf_status dlf_fuse(struct dlf_fuser *fuser,
                         const struct dlf_logits *logits,
                         const struct dlf_rule *rule,
                         const struct dlf_sampling *sampling,
                         const struct dlf_row *rows,
                         size_t num_rows,
                         struct dlf_decision *decisions);

// Opens an ensemble. `options` may be null. On failure `*engine` is left as it was.
enum dlf_status dlf_open(const struct dlf_models *models,
                         const struct dlf_options *options,
                         struct dlf_engine **engine);

// Opens the demo ensemble, which is inside the library. `options` may be null.
enum dlf_status dlf_open_demo(const struct dlf_options *options, struct dlf_engine **engine);

// Frees an ensemble; null is nothing.
void dlf_close(struct dlf_engine *engine);

// The number of token ids that all models share; 0 where `engine` is null.
size_t dlf_vocab_size(const struct dlf_engine *engine);

// How many experts there are; 0 where `engine` is null.
size_t dlf_num_experts(const struct dlf_engine *engine);

// The tokens of `text_len` bytes of UTF-8. `add_special` also adds what the model wants around a prompt: for most a
// BOS in front. `*len` gets their number, also where `capacity` is too small for them; `ids` may be null where it is 0.
enum dlf_status dlf_tokenize(const struct dlf_engine *engine,
                             const char *text,
                             size_t text_len,
                             bool add_special,
                             uint32_t *ids,
                             size_t capacity,
                             size_t *len);

// The text of `tokens` without special tokens, UTF-8 with a NUL behind it. `*len` gets its bytes without that NUL,
// also where `capacity` is too small for both; `text` may be null where it is 0.
enum dlf_status dlf_detokenize(const struct dlf_engine *engine,
                               struct dlf_tokens tokens,
                               char *text,
                               size_t capacity,
                               size_t *len);

// No prompt, the paper's rule, greedy, at most 128 tokens.
struct dlf_request dlf_request_default(void);

// Decodes requests together and calls `on_token` with each token as it is decided. A request that is wrong fails the
// call before anything is computed; one that fails later ends there, the others go on, and the call then returns the
// status of the first that did.
enum dlf_status dlf_generate(const struct dlf_engine *engine,
                             const struct dlf_request *requests,
                             size_t num_requests,
                             dlf_on_token on_token,
                             void *user_data);

// Scores a text: `decisions[i]` is about `ids[i + 1]` after all ids before it, so there is room for `ids.len - 1`.
// `rule` null is the paper's.
enum dlf_status dlf_score(const struct dlf_engine *engine,
                          const struct dlf_rule *rule,
                          struct dlf_tokens ids,
                          struct dlf_decision *decisions);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DLF_ENGINE_H */
