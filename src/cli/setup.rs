//! From flags to an ensemble, a rule, and a backend.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};

use super::args::{DeviceArgs, DynamicArgs, FusionArgs, Method, ModelArgs, RunArgs, SamplingArgs};
use crate::backend::BackendOptions;
use crate::ensemble::{Ensemble, EnsembleSpec, ExpertSpec};
use crate::error::Error;
use crate::fusion::{DynamicRule, FusionRule, PerExpert};
use crate::generate::{Generator, Request, limits_for};
use crate::kv_cache::BLOCK_SIZE;
use crate::model::{MAX_EXPERTS, Role};
use crate::sampling::SamplingParams;

impl ModelArgs {
    /// Whether no model is named, and the demo ensemble is meant.
    pub(crate) fn is_demo(&self) -> bool {
        self.large.is_none() && self.small.is_none() && self.experts.is_empty()
    }

    /// Loads the models that `method` uses.
    pub(crate) fn load(&self, method: &Method) -> Result<Ensemble> {
        let mut spec = if self.is_demo() { return Ok(Ensemble::demo()?) } else { self.spec()? };
        match method {
            Method::Dynamic | Method::Static => {}
            Method::Large if self.large.is_none() => return Err(missing("large", "--large DIR")),
            Method::Small if self.small.is_none() => return Err(missing("small", "--small DIR")),
            Method::Expert(_) if self.experts.is_empty() => return Err(missing("expert", "--expert DIR")),
            Method::Large => spec = EnsembleSpec { large: spec.large, ..EnsembleSpec::default() },
            Method::Small => spec = EnsembleSpec { small: spec.small, ..EnsembleSpec::default() },
            // A LoRA expert needs the small model's weights.
            Method::Expert(_) => spec.large = None,
        }
        for (flag, dir) in [("--large", &spec.large), ("--small", &spec.small)] {
            if let Some(dir) = dir {
                check_directory(&format!("{flag} {}", dir.display()), dir)?;
            }
        }
        for (given, expert) in self.experts.iter().zip(&spec.experts) {
            check_directory(&format!("--expert {given}"), &expert.path)?;
        }
        load(&spec)
    }

    fn spec(&self) -> Result<EnsembleSpec> {
        if self.experts.len() > MAX_EXPERTS {
            bail!("--expert: at most {MAX_EXPERTS} experts, found {}", self.experts.len());
        }
        let experts = self.experts.iter().map(|text| expert(text)).collect();
        Ok(EnsembleSpec { large: self.large.clone(), small: self.small.clone(), experts })
    }
}

fn missing(method: &'static str, what: &str) -> anyhow::Error {
    Error::MissingModel { method, what: what.to_owned() }.into()
}

/// Fails where `dir` is no directory; `given` is what was typed.
pub(super) fn check_directory(given: &str, dir: &Path) -> Result<()> {
    if dir.as_os_str().is_empty() {
        bail!("{given}: the directory is missing");
    }
    match std::fs::metadata(dir) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => bail!("{given} is a file; a model is a directory with a config.json"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
            "{given}: no such directory; nothing is downloaded: fetch the model first, as by `hf download ORG/NAME \
             --local-dir DIR`"
        ),
        Err(error) => Err(error).context(given.to_owned()),
    }
}

/// Loads the models. Where two don't fit together, the error calls experts as the user did.
pub(super) fn load(spec: &EnsembleSpec) -> Result<Ensemble> {
    let called = |role| match role {
        Role::Expert(t) => {
            let expert = spec.experts.get(t);
            let name = expert.and_then(|expert| expert.name.clone());
            let path = || expert.map_or_else(String::new, |expert| expert.path.display().to_string());
            format!("the expert {}", name.unwrap_or_else(path))
        }
        role => format!("the {role} model"),
    };
    Ensemble::load(spec).map_err(|error| match error {
        Error::Mismatch { left, right, what, expected, found } => {
            anyhow!("{} and {} differ in {what}: {expected} and {found}", called(left), called(right))
        }
        other => other.into(),
    })
}

/// Said of models that were probably given in each other's place.
pub(super) fn swapped(ensemble: &Ensemble) -> Option<&'static str> {
    let size = |role| Some(ensemble.models().get(ensemble.index(role)?)?.num_parameters());
    swapped_sizes(size(Role::Large)?, size(Role::Small)?)
}

/// The same of their numbers of parameters.
pub(super) fn swapped_sizes(large: usize, small: usize) -> Option<&'static str> {
    (large < small).then_some("the large model has fewer parameters than the small one; are they swapped?")
}

/// Tells what somebody who isn't told may wonder about.
pub(super) fn note<T: std::fmt::Display>(quiet: bool, notes: impl IntoIterator<Item = T>) {
    for note in notes.into_iter().filter(|_| !quiet) {
        // Nothing is lost where stderr is closed.
        let _ = writeln!(std::io::stderr(), "note: {note}");
    }
}

/// The flags of the models that a method of fusion lacks.
fn lacking(method: &'static str, ensemble: &Ensemble) -> anyhow::Error {
    let models = [
        ("large", "--large DIR", ensemble.index(Role::Large).is_some()),
        ("small", "--small DIR", ensemble.index(Role::Small).is_some()),
        ("expert", "--expert DIR", ensemble.num_experts() > 0),
    ];
    let flags: Vec<&str> = models.iter().filter(|(.., there)| !there).map(|(_, flag, _)| *flag).collect();
    let alone = models.iter().find(|(.., there)| *there).map_or("large", |(name, ..)| name);
    let flags = flags.join(" and ");
    anyhow!("the {method} method needs {flags} as well; to run one model alone: --method {alone}")
}

/// `[NAME=]DIR`. A directory that exists under the whole text is taken first: its name may hold `=`.
fn expert(text: &str) -> ExpertSpec {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !PathBuf::from(text).exists() => {
            ExpertSpec { name: Some(name.to_owned()), path: path.into() }
        }
        _ => ExpertSpec { name: None, path: text.into() },
    }
}

impl FusionArgs {
    /// The rule for an ensemble.
    pub(crate) fn rule(&self, ensemble: &Ensemble) -> Result<FusionRule> {
        self.dynamic.rule(&self.method, &self.alpha, ensemble)
    }
}

impl DynamicArgs {
    /// The rule of a method for an ensemble; `alpha` is the static one's.
    pub(crate) fn rule(&self, method: &Method, alpha: &[f64], ensemble: &Ensemble) -> Result<FusionRule> {
        let rule = match method {
            Method::Dynamic => {
                let mut rule = DynamicRule {
                    mode: self.search.into(),
                    objective: self.objective.into(),
                    every: self.alpha_every as usize,
                    ..DynamicRule::default()
                };
                if !self.alpha_grid.is_empty() {
                    rule.grids = per_expert(&self.alpha_grid).context("--alpha-grid")?;
                }
                FusionRule::Dynamic(rule)
            }
            Method::Static if alpha.is_empty() => FusionRule::Static(std::iter::once(1.0).collect()),
            Method::Static => FusionRule::Static(per_expert(alpha).context("--alpha")?),
            Method::Large => FusionRule::Large,
            Method::Small => FusionRule::Small,
            Method::Expert(None) => FusionRule::Expert(0),
            Method::Expert(Some(name)) => {
                let names: Vec<&str> = (0..).map_while(|t| ensemble.expert_name(t)).collect();
                let found = names.iter().position(|known| known == name);
                FusionRule::Expert(found.with_context(|| {
                    format!("--method expert:{name}: the experts are {}", names.join(", "))
                })?)
            }
        };
        match ensemble.check_rule(&rule) {
            Ok(()) => Ok(rule),
            Err(Error::MissingModel { method, .. }) if rule.is_fused() => Err(lacking(method, ensemble)),
            Err(error) => Err(error.into()),
        }
    }
}

fn per_expert<T: Clone>(values: &[T]) -> Result<PerExpert<T>> {
    if values.len() > MAX_EXPERTS {
        bail!("at most {MAX_EXPERTS} values, found {}", values.len());
    }
    Ok(values.iter().cloned().collect())
}

impl SamplingArgs {
    /// The sampler's parameters, validated.
    pub(crate) fn params(&self) -> Result<SamplingParams> {
        let params = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
        };
        params.validate()?;
        Ok(params)
    }

    /// A request with these parameters.
    pub(crate) fn request(&self, prompts: Vec<Vec<u32>>, rule: &FusionRule) -> Result<Request> {
        Ok(Request {
            prompts,
            forced: Vec::new(),
            rule: rule.clone(),
            sampling: self.params()?,
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            stop_strings: self.stop.clone(),
            stop_token_ids: self.stop_token_id.clone(),
            ignore_eos: self.ignore_eos,
            top_logprobs: 0,
        })
    }
}

impl RunArgs {
    /// Tells what somebody who isn't told may wonder about.
    pub(crate) fn note<T: std::fmt::Display>(&self, notes: impl IntoIterator<Item = T>) {
        note(self.quiet, notes);
    }

    /// A generator whose cache holds the longest of `requests` at least `batch_size` times, unless `--kv-memory` is
    /// less than that.
    pub(crate) fn generator(&self, ensemble: Arc<Ensemble>, requests: &[Request]) -> Result<Generator> {
        let mut limits = limits_for(&ensemble, requests, self.batch_size.into());
        if let Some(mib) = self.kv_memory {
            let longest = limits_for(&ensemble, requests, 1).blocks;
            let affordable = affordable_blocks(&ensemble, mib)?;
            if affordable < longest {
                let needed = (longest * block_bytes(&ensemble)).div_ceil(1 << 20);
                bail!("--kv-memory {mib}: the longest sequence takes {needed} MiB in all models");
            }
            limits.blocks = limits.blocks.min(affordable);
        }
        self.device.note_fallback(self.quiet);
        open(self.device.backend(limits), ensemble, self.quiet)
    }
}

impl DeviceArgs {
    /// Tells of a GPU that `auto` can't use.
    pub(crate) fn note_fallback(&self, quiet: bool) {
        let reason = self.device().passed_over();
        note(quiet, reason.map(|reason| format!("--device auto is the CPU here: {reason}")));
    }
}

/// A generator on a backend; while weights go to a GPU, a terminal shows how far.
pub(crate) fn open(options: BackendOptions, ensemble: Arc<Ensemble>, quiet: bool) -> Result<Generator> {
    let bytes = ensemble.memory().weight_bytes as u64;
    let style = ProgressStyle::with_template("weights {bar:30} {bytes}/{total_bytes}")?;
    let mut bar: Option<ProgressBar> = None;
    let backend = options.open_with(Arc::clone(&ensemble), &mut |sent| {
        // Only a GPU sends anything.
        let bar = bar.get_or_insert_with(|| {
            if quiet { ProgressBar::hidden() } else { ProgressBar::new(bytes).with_style(style.clone()) }
        });
        bar.inc(sent as u64);
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(Generator::new(ensemble, backend))
}

/// Blocks of the caches of all models that `mib` MiB hold.
pub(crate) fn affordable_blocks(ensemble: &Ensemble, mib: u32) -> Result<usize> {
    let bytes = block_bytes(ensemble);
    let affordable = ((mib as usize) << 20) / bytes;
    if affordable == 0 {
        bail!("--kv-memory {mib}: {BLOCK_SIZE} tokens of these models take {bytes} bytes");
    }
    Ok(affordable)
}

/// One block in the cache of every model.
fn block_bytes(ensemble: &Ensemble) -> usize {
    (ensemble.memory().kv_bytes_per_token * BLOCK_SIZE).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_may_have_a_name() {
        let named = expert("sums=models/sums");
        assert_eq!((named.name.as_deref(), named.path), (Some("sums"), "models/sums".into()));
        let plain = expert("models/sums");
        assert_eq!((plain.name, plain.path), (None, "models/sums".into()));
        assert_eq!(expert("=x").name, None);
    }
}
