//! The `Generator` on a backend that plays a script: scheduling, prefix sharing, limits, stops.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "a test")]

#[path = "support/directory.rs"]
mod directory;
#[path = "support/scripted.rs"]
mod scripted;
#[path = "support/tiny.rs"]
mod tiny;
#[path = "support/vocabulary.rs"]
mod vocabulary;

use std::sync::Arc;

use dlf_engine::backend::Limits;
use dlf_engine::fusion::{DynamicRule, FusionRule};
use dlf_engine::generate::{FinishReason, Generator, Request, Step, blocks_needed};
use dlf_engine::{Ensemble, EnsembleSpec, Error};
use proptest::prelude::*;
use scripted::Scripted;

/// The vocabulary of the tiny ensemble; ids from 90 on are never said by [`next`].
const VOCAB: u32 = 97;

/// Depends on every token before.
fn next(tokens: &[u32]) -> u32 {
    tokens.iter().fold(7u32, |hash, &t| hash.wrapping_mul(31).wrapping_add(t)) % 90
}

fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next(&tokens));
    }
    tokens.split_off(prompt.len())
}

fn generator(limits: Limits) -> Generator {
    let ensemble: Arc<Ensemble> = Arc::new(tiny::ensemble(1));
    let models = ensemble.models().len();
    Generator::new(ensemble, Box::new(Scripted::new(limits, models, next)))
}

const LIMITS: Limits = Limits { rows: 8, slots: 4, blocks: 64 };

fn tokens_of(steps: &[Step], request: usize) -> Vec<u32> {
    steps.iter().filter(|step| step.request == request).map(|step| step.token).collect()
}

fn run(generator: Generator) -> Vec<Step> {
    generator.collect::<Result<_, _>>().unwrap()
}

#[test]
fn a_long_prompt_is_read_in_chunks() {
    let mut generator = generator(LIMITS);
    let prompt: Vec<u32> = (0..50).collect();
    generator.push(Request::new(prompt.clone(), 20)).unwrap();
    let steps = run(generator);
    assert_eq!(tokens_of(&steps, 0), expected(&prompt, 20));
    assert_eq!(steps.last().unwrap().finish, Some(FinishReason::Length));
    assert!(steps[..19].iter().all(|step| step.finish.is_none()));
}

#[test]
fn roles_may_have_prompts_of_different_lengths() {
    let mut generator = generator(LIMITS);
    let prompts = vec![vec![1, 2, 3], (0..30).collect(), vec![5]];
    generator.push(Request { prompts, ..Request::new(vec![], 10) }).unwrap();
    assert_eq!(tokens_of(&run(generator), 0), expected(&[1, 2, 3], 10));
}

#[test]
fn end_tokens_end_and_min_new_tokens_bans_them() {
    let second = expected(&[1, 2], 2)[1];
    let mut generator = generator(LIMITS);
    let request = Request { stop_token_ids: vec![second], ..Request::new(vec![1, 2], 5) };
    generator.push(request.clone()).unwrap();
    generator.push(Request { min_new_tokens: 2, ..request }).unwrap();
    let steps = run(generator);
    assert_eq!(tokens_of(&steps, 0), expected(&[1, 2], 2));
    let first = steps.iter().find(|step| step.request == 0 && step.finish.is_some()).unwrap();
    assert_eq!(first.finish, Some(FinishReason::Stop));
    // The script says one more where its word is banned.
    assert_eq!(tokens_of(&steps, 1)[1], second + 1);
}

#[test]
fn scoring_gives_every_position_its_step() {
    let mut generator = generator(LIMITS);
    let ids: Vec<u32> = (10..40).collect();
    generator.push(Request::score(ids.clone())).unwrap();
    let steps = run(generator);
    assert_eq!(tokens_of(&steps, 0), ids[1..]);
    for (k, step) in steps.iter().enumerate() {
        assert!(step.forced);
        assert_eq!(step.index, k);
        assert_eq!(step.decision.argmax_fused, next(&ids[..=k]), "position {k}");
    }
    assert_eq!(steps.last().unwrap().finish, Some(FinishReason::Length));
}

#[test]
fn a_scored_text_can_be_continued() {
    let mut generator = generator(LIMITS);
    let request = Request { forced: vec![4, 5, 6], ..Request::new(vec![1], 3) };
    generator.push(request).unwrap();
    let mut all = vec![4, 5, 6];
    all.extend(expected(&[1, 4, 5, 6], 3));
    assert_eq!(tokens_of(&run(generator), 0), all);
}

#[test]
fn alpha_is_held_between_searches_also_where_many_steps_are_scored_at_once() {
    let rule = FusionRule::Dynamic(DynamicRule { every: 3, ..DynamicRule::default() });
    let mut generator = generator(Limits { rows: 64, slots: 5, blocks: 64 });
    generator.push(Request::score((0..12).collect()).rule(rule.clone())).unwrap();
    generator.push(Request::new(vec![1], 11).rule(rule)).unwrap();
    let steps = run(generator);
    for request in 0..2 {
        let alphas: Vec<f64> =
            steps.iter().filter(|s| s.request == request).map(|s| s.decision.alpha[0]).collect();
        assert_eq!(alphas, [0., 0., 0., 3., 3., 3., 6., 6., 6., 9., 9.]);
    }
}

#[test]
fn a_request_that_never_fits_fails_alone() {
    let mut generator = generator(Limits { blocks: blocks_needed(1, 40), ..LIMITS });
    generator.push(Request::new(vec![1], 60)).unwrap();
    generator.push(Request::new(vec![2], 10)).unwrap();
    let results: Vec<_> = generator.collect();
    assert!(matches!(&results[0], Err(Error::Request { request: 0, source })
        if matches!(**source, Error::CacheFull { .. })));
    let steps: Vec<Step> = results.into_iter().skip(1).map(Result::unwrap).collect();
    assert_eq!(tokens_of(&steps, 1), expected(&[2], 10));
}

#[test]
fn any_number_of_requests_that_never_fit_fail_one_by_one() {
    let mut generator = generator(Limits { blocks: 1, ..LIMITS });
    // As many as would overflow the stack if each were a call inside the last one's.
    let count = 50_000;
    for _ in 0..count {
        generator.push(Request::new(vec![1], 100)).unwrap();
    }
    assert_eq!(generator.filter(|step| matches!(step, Err(Error::Request { .. }))).count(), count);
}

#[test]
fn impossible_requests_are_refused() {
    let mut generator = generator(LIMITS);
    let context = tiny::CONTEXT;
    let error = |generator: &mut Generator, request| generator.push(request).unwrap_err();
    assert!(matches!(error(&mut generator, Request::new(vec![], 1)), Error::EmptyPrompt { .. }));
    assert!(matches!(
        error(&mut generator, Request::new(vec![VOCAB], 1)),
        Error::TokenOutOfRange { id: VOCAB, .. }
    ));
    assert!(matches!(
        error(&mut generator, Request::new(vec![1; context + 1], 1)),
        Error::PromptTooLong { .. }
    ));
    assert!(matches!(error(&mut generator, Request::new(vec![1], 0)), Error::Parameter { .. }));
    let empty_stop = Request { stop_strings: vec![String::new()], ..Request::new(vec![1], 1) };
    assert!(matches!(error(&mut generator, empty_stop), Error::Parameter { name: "stop", .. }));
    let no_text = Request { stop_strings: vec!["x".to_owned()], ..Request::new(vec![1], 1) };
    assert!(matches!(error(&mut generator, no_text), Error::Parameter { name: "stop", .. }));
    assert!(generator.next().is_none());
}

#[test]
fn generation_ends_where_the_context_does() {
    let mut generator = generator(Limits { blocks: 256, ..LIMITS });
    generator.push(Request::new(vec![1; tiny::CONTEXT - 2], 100)).unwrap();
    let steps = run(generator);
    // Two more tokens can be read, and one more is decided after the last.
    assert_eq!(steps.len(), 3);
    assert_eq!(steps[2].finish, Some(FinishReason::Length));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Whatever else is in flight, whatever is shared, a request gets its own text.
    #[test]
    fn batch_is_alone(
        requests in prop::collection::vec((0u32..3, 1usize..60, 0usize..20, 0usize..20), 1..8),
        rows in 1usize..40,
        slots in 1usize..6,
        blocks in 6usize..30,
    ) {
        let mut generator = generator(Limits { rows, slots, blocks });
        let mut wanted = Vec::new();
        for &(start, length, forced, new) in &requests {
            // Few beginnings, so that prefixes are shared.
            let prompt: Vec<u32> = (0..length as u32).map(|k| (start * (k / 20) + k) % 90).collect();
            let forced: Vec<u32> = (0..forced as u32).map(|k| k % 90).collect();
            let request = Request { forced: forced.clone(), ..Request::new(prompt.clone(), new + 1) };
            generator.push(request).unwrap();
            let read: Vec<u32> = prompt.iter().chain(&forced).copied().collect();
            wanted.push(forced.into_iter().chain(expected(&read, new + 1)).collect::<Vec<u32>>());
        }
        let mut steps = Vec::new();
        let mut failed = Vec::new();
        for step in generator {
            match step {
                Ok(step) => steps.push(step),
                Err(Error::Request { request, .. }) => failed.push(request),
                Err(error) => panic!("{error}"),
            }
        }
        for (request, wanted) in wanted.iter().enumerate() {
            let (start, length, forced, new) = requests[request];
            let fits = blocks_needed(1, length + forced + new + 1) <= blocks;
            prop_assert_eq!(failed.contains(&request), !fits, "{}", start);
            if fits {
                prop_assert_eq!(&tokens_of(&steps, request), wanted);
            }
        }
    }
}

#[test]
fn a_cancelled_request_gives_its_blocks_back_and_the_others_go_on() {
    // Room for two sequences of 40 tokens in each model: the third waits.
    let mut generator = generator(Limits { blocks: 6, ..LIMITS });
    let prompts: Vec<Vec<u32>> = (0..3).map(|n| (n..n + 20).collect()).collect();
    for prompt in &prompts {
        generator.push(Request::new(prompt.clone(), 20)).unwrap();
    }
    let mut steps: Vec<Step> = Vec::new();
    while steps.iter().filter(|step| step.request == 0).count() < 3 {
        steps.push(generator.next().unwrap().unwrap());
    }
    let full = generator.cache().map(|cache| (cache.blocks, cache.used)).collect::<Vec<_>>();
    assert!(full.iter().all(|&cache| cache == (6, 6)), "{full:?}");
    generator.cancel(0);
    assert!(generator.cache().all(|cache| cache.used == 3));
    // Of one that runs, one that ended, and one that never was.
    generator.cancel(0);
    generator.cancel(7);
    let rest: Vec<Step> = generator.by_ref().collect::<Result<_, _>>().unwrap();
    assert!(rest.iter().all(|step| step.request != 0), "none of its steps comes any more");
    steps.extend(rest);
    for request in [1, 2] {
        assert_eq!(tokens_of(&steps, request), expected(&prompts[request], 20));
    }
    assert!(generator.cache().all(|cache| cache.used == 0));
}

#[test]
fn a_request_that_waits_can_be_cancelled() {
    let mut generator = generator(Limits { blocks: 3, ..LIMITS });
    for start in [0, 30] {
        generator.push(Request::new((start..start + 20).collect(), 20)).unwrap();
    }
    generator.next().unwrap().unwrap();
    generator.cancel(1);
    assert!(generator.by_ref().map(Result::unwrap).all(|step| step.request == 0));
    generator.push(Request::new(vec![1], 1)).unwrap();
    assert_eq!(generator.by_ref().map(Result::unwrap).map(|step| step.request).collect::<Vec<_>>(), [2]);
    assert!(generator.cache().all(|cache| cache.used == 0));
}

/// What [`say`] says, byte by byte: every token of a character but one is a part of it.
const SAID: &str = "ab🙂c, 猫。d";

fn say(tokens: &[u32]) -> u32 {
    3 + u32::from(SAID.as_bytes()[(tokens.len() - 1) % SAID.len()])
}

#[test]
fn a_stop_string_may_end_inside_a_character_of_several_tokens() {
    let dir = tempfile::tempdir().unwrap();
    directory::write_model(dir.path(), &directory::config_with(serde_json::json!({"vocab_size": 300})));
    std::fs::write(dir.path().join("tokenizer.json"), vocabulary::byte_level().to_string()).unwrap();
    let spec = EnsembleSpec { large: Some(dir.path().to_owned()), ..EnsembleSpec::default() };
    let ensemble = Arc::new(Ensemble::load(&spec).unwrap());
    for (stop, text) in
        [("猫", "ab🙂c, "), ("🙂", "ab"), ("c, 猫", "ab🙂"), ("。", "ab🙂c, 猫"), ("🙃", SAID)]
    {
        let backend = Scripted::new(LIMITS, 1, say);
        let mut generator = Generator::new(Arc::clone(&ensemble), Box::new(backend));
        let request = Request { stop_strings: vec![stop.to_owned()], ..Request::new(vec![5], SAID.len()) };
        generator.push(request.rule(FusionRule::Large)).unwrap();
        let steps = run(generator);
        let shown: Vec<&str> = steps.iter().map(|step| step.text.as_str()).collect();
        assert_eq!(shown.concat(), text, "{stop}");
        // It ends with the token that holds the last byte of the stop string, and of nothing that isn't whole.
        let end = SAID.find(stop).map_or(SAID.len(), |start| start + stop.len());
        assert_eq!(
            tokens_of(&steps, 0),
            SAID.bytes().take(end).map(|byte| 3 + u32::from(byte)).collect::<Vec<_>>()
        );
        let finish = if SAID.contains(stop) { FinishReason::Stop } else { FinishReason::Length };
        assert_eq!(steps.last().unwrap().finish, Some(finish), "{stop}");
        assert!(shown.iter().all(|text| !text.contains(char::REPLACEMENT_CHARACTER)), "{shown:?}");
    }
}
