//! Directories → [`Ensemble`].

use std::path::{Path, PathBuf};

use super::Ensemble;
use crate::error::{Error, Result};
use crate::model::{LlamaModel, MAX_EXPERTS, Role, is_adapter};
#[cfg(feature = "tokenizer")]
use crate::tokenizer::{Parsed, Tokenizer};

/// The directories of an ensemble.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EnsembleSpec {
    /// The large model.
    pub large: Option<PathBuf>,
    /// The small model.
    pub small: Option<PathBuf>,
    /// The experts.
    pub experts: Vec<ExpertSpec>,
}

/// The directory of one expert: a fine-tuned small model, or a LoRA adapter over the small model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertSpec {
    /// What traces and tables call it; by default the directory's name, with `-2`, `-3` … where that is taken.
    pub name: Option<String>,
    /// The directory.
    pub path: PathBuf,
}

impl Ensemble {
    /// Loads the models, maps their weights, and checks that they fit together. A directory that is named twice is
    /// mapped once. A directory without `tokenizer.json` works where token ids are given.
    ///
    /// # Errors
    /// Those of [`LlamaModel::load`], [`LlamaModel::with_adapter`], [`Ensemble::from_models`] and
    /// [`Ensemble::with_tokenizers`]; [`Error::Parameter`] where two experts are given one name.
    pub fn load(spec: &EnsembleSpec) -> Result<Self> {
        if spec.experts.len() > MAX_EXPERTS {
            return Err(Error::Parameter {
                name: "experts",
                expected: format!("at most {MAX_EXPERTS}"),
                found: spec.experts.len().to_string(),
            });
        }
        let names = expert_names(&spec.experts)?;
        let mut loader = Loader::default();
        let mut models = Vec::new();
        for (role, dir) in [(Role::Large, &spec.large), (Role::Small, &spec.small)] {
            if let Some(dir) = dir {
                models.push(loader.model(role, &role.to_string(), dir)?);
            }
        }
        let small = models.iter().position(|model: &LlamaModel| model.role == Role::Small);
        for (index, (expert, name)) in spec.experts.iter().zip(&names).enumerate() {
            let role = Role::Expert(index);
            let model = match small.and_then(|small| models.get(small)) {
                Some(small) if is_adapter(&expert.path) => small.with_adapter(role, name, &expert.path)?,
                _ => loader.model(role, name, &expert.path)?,
            };
            models.push(model);
        }
        #[cfg(feature = "tokenizer")]
        let tokenizers = tokenizers(&models)?;
        let ensemble = Self::from_models(models)?;
        #[cfg(feature = "tokenizer")]
        let ensemble = ensemble.with_tokenizers(tokenizers)?;
        Ok(ensemble)
    }
}

/// Maps each directory once.
#[derive(Default)]
struct Loader {
    loaded: Vec<(PathBuf, LlamaModel)>,
}

impl Loader {
    fn model(&mut self, role: Role, name: &str, dir: &Path) -> Result<LlamaModel> {
        let real = dir.canonicalize().map_err(|error| Error::io(dir, error))?;
        if let Some((_, known)) = self.loaded.iter().find(|(path, _)| *path == real) {
            return Ok(LlamaModel { role, name: name.to_owned(), path: dir.to_owned(), ..known.clone() });
        }
        let model = LlamaModel::load(role, name, dir)?;
        self.loaded.push((real, model.clone()));
        Ok(model)
    }
}

/// The tokenizer of every model; models that share weights share the tokenizer, unless an adapter brings its own.
#[cfg(feature = "tokenizer")]
fn tokenizers(models: &[LlamaModel]) -> Result<Vec<Option<Tokenizer>>> {
    let (mut tokenizers, mut parsed): (Vec<Option<Tokenizer>>, _) = (Vec::new(), Parsed::default());
    for model in models {
        let twin = models
            .iter()
            .zip(&tokenizers)
            .find(|(twin, _)| std::sync::Arc::ptr_eq(&twin.weights, &model.weights));
        let shared = twin.and_then(|(_, tokenizer)| tokenizer.clone());
        tokenizers.push(match (shared, &model.adapter) {
            (Some(shared), None) => Some(shared),
            (shared, _) => Tokenizer::load_with(&model.path, &mut parsed)?.or(shared),
        });
    }
    Ok(tokenizers)
}

/// The name of every expert: given, or that of its directory. `large` and `small` are taken.
fn expert_names(experts: &[ExpertSpec]) -> Result<Vec<String>> {
    let mut taken = vec!["large".to_owned(), "small".to_owned()];
    for name in experts.iter().filter_map(|expert| expert.name.as_ref()) {
        if name.is_empty() || taken.contains(name) {
            return Err(Error::Parameter {
                name: "expert name",
                expected: "a name of its own for each expert, not large or small".to_owned(),
                found: format!("{name:?}"),
            });
        }
        taken.push(name.clone());
    }
    let mut names = Vec::new();
    for expert in experts {
        let name = match &expert.name {
            Some(name) => name.clone(),
            None => {
                let name = directory_name(&expert.path);
                let numbered = (2..).map(|number| format!("{name}-{number}"));
                let free = std::iter::once(name.clone()).chain(numbered).find(|name| !taken.contains(name));
                let name = free.unwrap_or(name);
                taken.push(name.clone());
                name
            }
        };
        names.push(name);
    }
    Ok(names)
}

/// The last part of a path, looked up where it is `.` or `..`.
fn directory_name(path: &Path) -> String {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    name(path).or_else(|| name(&path.canonicalize().ok()?)).unwrap_or_else(|| "expert".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(experts: &[(Option<&str>, &str)]) -> Result<Vec<String>> {
        let specs: Vec<_> = experts
            .iter()
            .map(|&(name, path)| ExpertSpec { name: name.map(str::to_owned), path: path.into() })
            .collect();
        expert_names(&specs)
    }

    #[test]
    fn default_names_are_those_of_the_directories_made_unique() {
        let found =
            names(&[(None, "a/math"), (None, "b/math/"), (None, "c/small"), (Some("math-2"), "d")]).unwrap();
        assert_eq!(found, ["math", "math-3", "small-2", "math-2"]);
    }

    #[test]
    fn given_names_must_differ() {
        for experts in [[(Some("a"), "x"), (Some("a"), "y")], [(Some("large"), "x"), (None, "y")]] {
            let error = names(&experts).unwrap_err();
            assert!(error.to_string().starts_with("expert name: expected a name of its own"), "{error}");
        }
        assert!(names(&[(Some(""), "x")]).is_err());
    }
}
