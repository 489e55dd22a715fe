//! Steps of decoding on the virtual device as graphs: to the bit those that are launched on demand, whatever the batch
//! does, and as few launches as promised.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::sync::Arc;

use dlf_engine::Ensemble;
use dlf_engine::backend::Limits;
use dlf_engine::backend::cuda::{CudaBackend, CudaOptions};
use dlf_engine::fusion::{DynamicRule, FusionRule, SearchMode};
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::Dtype;
use dlf_engine::{Generator, Request, SamplingParams, Step};
use virtual_gpu::host::{Driver, Gpu, Node};

#[path = "support/models.rs"]
mod models;

use models::{EVEN, Shape, adapter, mixed_ensemble, model, tokens};

const LIMITS: Limits = Limits { rows: 64, slots: 8, blocks: 48 };

/// A large model that is wider than the small one, and experts of their own weights.
fn ensemble(experts: usize) -> Arc<Ensemble> {
    let wide = Shape { hidden: 96, heads: 8, kv_heads: 4, ..EVEN };
    let roles = std::iter::once(Role::Small).chain((0..experts).map(Role::Expert));
    let group = roles.enumerate().map(|(seed, role)| model(role, EVEN, Dtype::Bf16, seed as u64 + 2));
    let models: Vec<LlamaModel> =
        std::iter::once(model(Role::Large, wide, Dtype::Bf16, 1)).chain(group).collect();
    Arc::new(Ensemble::from_models(models).unwrap())
}

/// The same with experts that are low-rank updates of the small model.
fn adapted(experts: usize) -> Arc<Ensemble> {
    let mut models: Vec<LlamaModel> = ensemble(0).models().iter().map(|model| (**model).clone()).collect();
    let small = models[1].clone();
    models.extend((0..experts).map(|t| LlamaModel {
        role: Role::Expert(t),
        adapter: Some(adapter(EVEN, t as u64 + 5)),
        ..small.clone()
    }));
    Arc::new(Ensemble::from_models(models).unwrap())
}

fn open(ensemble: &Arc<Ensemble>, graphs: bool) -> (Gpu, Generator) {
    open_with(ensemble, graphs, LIMITS)
}

fn open_with(ensemble: &Arc<Ensemble>, graphs: bool, limits: Limits) -> (Gpu, Generator) {
    let gpu = Driver::load().unwrap().device("h100").unwrap();
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs };
    let cuda = CudaBackend::new(Arc::clone(ensemble), options, &mut |_| {}).unwrap();
    (gpu, Generator::new(Arc::clone(ensemble), Box::new(cuda)))
}

fn run(generator: Generator) -> Vec<Step> {
    let mut steps: Vec<Step> = generator.map(|step| step.unwrap()).collect();
    steps.sort_by_key(|step| (step.request, step.index));
    steps
}

/// All but the times.
fn assert_same(found: &[Step], expected: &[Step]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let key = |step: &Step| (step.request, step.index, step.token, step.decision.clone());
        assert_eq!(key(found), key(expected));
    }
}

fn prompt(seed: usize, length: usize) -> Vec<u32> {
    tokens(length, EVEN.vocab, seed)
}

/// Sequences that end at different steps, under rules of every kind.
fn requests() -> Vec<Request> {
    let sampled = SamplingParams { temperature: 0.9, seed: 5, ..SamplingParams::default() };
    let every = |every, mode| FusionRule::Dynamic(DynamicRule { every, mode, ..DynamicRule::default() });
    let truncated = SamplingParams {
        temperature: 1.3,
        top_k: 40,
        top_p: 0.9,
        min_p: 0.01,
        repetition_penalty: 1.2,
        presence_penalty: 0.4,
        frequency_penalty: 0.3,
        seed: 11,
        ..SamplingParams::default()
    };
    let biased =
        SamplingParams { logit_bias: vec![(3, 4.0), (9, f32::NEG_INFINITY)], ..SamplingParams::default() };
    let mut requests = vec![
        Request::new(prompt(0, 5), 12),
        Request::new(prompt(1, 17), 7).rule(FusionRule::Static(std::iter::once(0.7).collect())),
        Request::new(prompt(2, 3), 9).sampling(sampled),
        Request::new(prompt(3, 4), 9).rule(every(3, SearchMode::Grid)),
        Request::new(prompt(4, 6), 6).rule(FusionRule::Large),
        Request::new(prompt(5, 7), 10).sampling(truncated),
        Request::new(prompt(6, 2), 8).rule(every(1, SearchMode::Refine)),
        Request::new(prompt(7, 5), 9).rule(every(2, SearchMode::Refine)).sampling(biased),
        Request::new(prompt(8, 5), 9),
    ];
    // Ends of the text are banned up to there: the step after it can't be foreseen. It lies in either half of the logits.
    for (request, min_new_tokens) in [(8, 4), (7, 5)] {
        requests[request].min_new_tokens = min_new_tokens;
        requests[request].stop_token_ids = vec![1, 2];
    }
    for request in &mut requests {
        request.ignore_eos = true;
    }
    requests
}

#[test]
fn graphs_give_what_eager_launches_give() {
    let (models, _) = mixed_ensemble(EVEN, Dtype::F16);
    for ensemble in [ensemble(2), Arc::new(Ensemble::from_models(models).unwrap())] {
        // Alone, where a long chain of steps runs ahead, and all together, where sequences end and chains break.
        let mut launched = 0;
        for range in (0..9).map(|one| one..one + 1).chain([0..5, 0..9]) {
            let (eager_gpu, mut eager) = open(&ensemble, false);
            let (gpu, mut graphs) = open(&ensemble, true);
            for request in &requests()[range] {
                eager.push(request.clone()).unwrap();
                graphs.push(request.clone()).unwrap();
            }
            let (graphs, eager) = (run(graphs), run(eager));
            assert_same(&graphs, &eager);
            assert_eq!((gpu.reports(), eager_gpu.reports()), (vec![], vec![]));
            assert_eq!(eager_gpu.calls("cuGraphLaunch"), 0);
            launched += gpu.calls("cuGraphLaunch");
        }
        // A chain begins at the third step: 10 + 5 + 7 + 7 + 4 + 8 + 6 of those alone, and some of the last.
        assert!(launched >= 47, "{launched}");
    }
}

#[test]
fn graphs_of_large_batches_run_on_tensor_cores() {
    // In the second one so many columns are summed that several blocks share them.
    let long = Shape { intermediate: 1100, ..EVEN };
    let roles = [Role::Large, Role::Small, Role::Expert(0)];
    let models =
        roles.into_iter().enumerate().map(|(seed, role)| model(role, long, Dtype::Bf16, seed as u64));
    for ensemble in [ensemble(1), Arc::new(Ensemble::from_models(models.collect()).unwrap())] {
        graphs_of_a_large_batch(&ensemble);
    }
}

fn graphs_of_a_large_batch(ensemble: &Arc<Ensemble>) {
    let limits = Limits { rows: 64, slots: 20, blocks: 80 };
    let mut of_mode = Vec::new();
    for graphs in [false, true] {
        let (gpu, mut generator) = open_with(ensemble, graphs, limits);
        gpu.seed(u64::from(graphs));
        for seed in 0..20 {
            generator.push(Request { ignore_eos: true, ..Request::new(prompt(seed, 2), 5) }).unwrap();
        }
        of_mode.push(run(generator));
        assert_eq!(gpu.reports(), []);
        assert_eq!(gpu.calls("cuGraphLaunch") > 0, graphs);
        // 20 rows of each model in every step, recorded or not.
        let launches = gpu.launches();
        assert!(launches.iter().filter(|launch| launch.kernel == "qkv_wide_bf16").count() >= 5 * 2);
    }
    assert_same(&of_mode[1], &of_mode[0]);
}

#[test]
fn a_step_of_several_turns_is_not_foreseen() {
    let tiny =
        Shape { hidden: 8, intermediate: 8, heads: 1, kv_heads: 1, head_dim: 8, vocab: 24, bias: false };
    let roles = [Role::Large, Role::Small].into_iter().chain((0..8).map(Role::Expert));
    let models = roles.enumerate().map(|(seed, role)| model(role, tiny, Dtype::F32, seed as u64 + 1));
    let ensemble = Arc::new(Ensemble::from_models(models.collect()).unwrap());
    // 57 sequences in nine models are 513 rows, and a turn has 512: the lists hold the last turn's only.
    let limits = Limits { rows: 57, slots: 57, blocks: 57 };
    let mut of_mode = Vec::new();
    for graphs in [false, true] {
        let (gpu, mut generator) = open_with(&ensemble, graphs, limits);
        for seed in 0..57 {
            let prompt = tokens(1, tiny.vocab, seed);
            generator.push(Request { ignore_eos: true, ..Request::new(prompt, 5) }).unwrap();
        }
        of_mode.push(run(generator));
        assert_eq!((gpu.reports(), gpu.calls("cuGraphLaunch")), (vec![], 0));
    }
    assert_same(&of_mode[1], &of_mode[0]);
}

#[test]
fn order_of_streams_and_blocks_changes_nothing() {
    for ensemble in [ensemble(1), adapted(2)] {
        let mut first: Option<Vec<Step>> = None;
        for seed in 0..4 {
            let (gpu, mut generator) = open(&ensemble, true);
            gpu.seed(seed);
            for request in &requests()[..3] {
                generator.push(request.clone()).unwrap();
            }
            let steps = run(generator);
            assert_eq!(gpu.reports(), []);
            assert_same(&steps, first.get_or_insert_with(|| steps.clone()));
        }
    }
}

#[test]
fn a_request_in_the_middle_breaks_no_chain_of_others() {
    let ensemble = ensemble(1);
    let mut all = Vec::new();
    for graphs in [false, true] {
        let (gpu, mut generator) = open(&ensemble, graphs);
        generator.push(requests()[0].clone()).unwrap();
        let mut steps: Vec<Step> = generator.by_ref().take(6).map(|step| step.unwrap()).collect();
        // Its blocks are free while the step after it is in flight, and the next request takes them.
        generator.cancel(0);
        generator.push(requests()[2].clone()).unwrap();
        steps.extend(run(generator));
        assert_eq!(gpu.reports(), []);
        all.push(steps);
    }
    assert_same(&all[1], &all[0]);
}

#[test]
fn logits_are_those_of_the_step_that_was_asked_for() {
    let ensemble = ensemble(1);
    let mut request = requests()[0].clone();
    request.top_logprobs = 4;
    let mut tops = Vec::new();
    for graphs in [false, true] {
        let (gpu, mut generator) = open(&ensemble, graphs);
        generator.push(request.clone()).unwrap();
        let steps = run(generator);
        assert_eq!(gpu.calls("cuGraphLaunch") > 0, graphs);
        tops.push(steps.into_iter().map(|step| step.top).collect::<Vec<_>>());
    }
    assert_eq!(tops[1], tops[0]);
    assert!(tops[0].iter().all(|top| top.len() == 4));
}

#[test]
fn a_token_is_one_graph_of_few_launches() {
    for ensemble in [ensemble(1), ensemble(3), adapted(1), adapted(8)] {
        let (gpu, mut generator) = open(&ensemble, true);
        generator.push(requests()[0].clone()).unwrap();
        let steps = generator.by_ref();
        for _ in 0..4 {
            steps.next().unwrap().unwrap();
        }
        gpu.clear();
        let before = |name| gpu.calls(name);
        let names = ["cuGraphLaunch", "cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuStreamBeginCapture_v2"];
        let counts = names.map(before);
        steps.next().unwrap().unwrap();
        let counts: Vec<u64> =
            names.iter().zip(counts).map(|(name, count)| gpu.calls(name) - count).collect();
        // The second half of the logits was recorded two steps ago: nothing but one launch.
        assert_eq!(counts, [1, 0, 0, 0]);
        // Each step has run once; what is in flight hasn't.
        let launches = gpu.launches();
        let layers = 2;
        assert!(launches.len() <= 6 * layers + 6 * layers + 8, "{}", launches.len());
        assert_eq!(launches.len(), 6 * layers + 6 * layers + 7);
        assert!(launches.iter().all(|launch| launch.from_graph));
    }
}

#[test]
fn kernels_are_loaded_when_they_are_needed() {
    let (gpu, mut generator) = open(&ensemble(1), true);
    let loads = || gpu.calls("cuModuleLoadData");
    // One dtype, so that both groups share them: the embedding, four projections, attention for either grouping of heads
    // and its merge; for prompts three projections, their rows, and attention; and two of the graph.
    let at_first = 8 + 5 + 2;
    assert_eq!(loads(), at_first);
    // Its positions go from four splits of attention to five, for which the graph has eight.
    let mut request = Request::new(prompt(0, 250), 12);
    request.ignore_eos = true;
    generator.push(request).unwrap();
    generator.next().unwrap().unwrap();
    // Fusion.
    assert_eq!(loads(), at_first + 1);
    // From here on steps are graphs, and nothing is loaded while one is recorded.
    assert_eq!(run(generator).len(), 11);
    assert!(gpu.calls("cuStreamBeginCapture_v2") > 2);
    assert_eq!(loads(), at_first + 1);
    assert_eq!(gpu.reports(), []);
}

#[test]
fn the_step_ahead_stops_at_the_end_of_the_blocks() {
    // Five blocks of 16 positions, all of which one sequence takes: the last steps have nothing ahead of them.
    let ensemble = ensemble(1);
    let (gpu, mut generator) = open_with(&ensemble, true, Limits { blocks: 5, ..LIMITS });
    let mut request = Request::new(prompt(7, 5 * 16 - 7), 7);
    request.ignore_eos = true;
    generator.push(request).unwrap();
    let steps = run(generator);
    assert_eq!(steps.len(), 7);
    assert_eq!(gpu.reports(), []);
}

/// For each node, all that come before it.
fn before(graph: &[Node]) -> Vec<BTreeSet<usize>> {
    let mut all: Vec<BTreeSet<usize>> = Vec::new();
    for node in graph {
        let earlier = node.after.iter().flat_map(|&at| all[at].iter().copied().chain([at])).collect();
        all.push(earlier);
    }
    all
}

#[test]
fn the_large_model_and_the_group_are_branches_of_the_graph() {
    // Dtypes tell whose a kernel is.
    let roles = [(Role::Large, Dtype::F16), (Role::Small, Dtype::Bf16), (Role::Expert(0), Dtype::Bf16)];
    let models = roles.map(|(role, dtype)| model(role, EVEN, dtype, 1)).to_vec();
    let ensemble = Arc::new(Ensemble::from_models(models).unwrap());
    let (gpu, mut generator) = open(&ensemble, true);
    generator.push(requests()[0].clone()).unwrap();
    let steps: Vec<Step> = generator.by_ref().take(5).map(|step| step.unwrap()).collect();
    assert_eq!(steps.len(), 5);
    let graphs = gpu.graphs();
    // One for each half of the logits.
    assert_eq!(graphs.len(), 2);
    for graph in graphs {
        let before = before(&graph);
        let are = |dtype: &str| -> Vec<usize> {
            let named = |node: &Node| node.work.split('_').any(|part| part == dtype);
            graph.iter().enumerate().filter(|(_, node)| named(node)).map(|(at, _)| at).collect()
        };
        let (large, small) = (are("f16"), are("bf16"));
        // The embedding, four projections a layer, and the logits.
        assert_eq!((large.len(), small.len()), (10, 10));
        for (&a, &b) in large.iter().flat_map(|a| small.iter().map(move |b| (a, b))) {
            let [a_waits, b_waits] = [before[a].contains(&b), before[b].contains(&a)];
            assert!(!a_waits && !b_waits, "{:?} and {:?}", graph[a], graph[b]);
        }
        let at = |name: &str| graph.iter().position(|node| node.work.starts_with(name)).unwrap();
        let (first, last) = (at("advance"), at("fuse_"));
        assert!(large.iter().chain(&small).all(|&kernel| before[kernel].contains(&first)));
        assert!(large.iter().chain(&small).all(|&kernel| before[last].contains(&kernel)));
        assert!(before[at("copy to the host")].contains(&last));
    }
}

#[test]
fn nothing_is_freed_that_a_graph_may_use() {
    let (gpu, mut generator) = open(&ensemble(1), true);
    for request in &requests()[..3] {
        generator.push(request.clone()).unwrap();
    }
    let steps: Vec<Step> = generator.by_ref().map(|step| step.unwrap()).collect();
    assert_eq!(steps.len(), 12 + 7 + 9);
    let alive = gpu.totals().alive;
    assert!(alive.graphs >= 2 && alive.executables == alive.graphs && alive.allocations > 0, "{alive:?}");
    drop(generator);
    assert_eq!(gpu.totals().freed_under_graphs, 0);
}
