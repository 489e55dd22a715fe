//! The safetensors files of a model, mapped, and their tensors, taken out one by one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::SafeTensors;

use super::{Dtype, Storage, Tensor};
use crate::error::{Error, Result};
use crate::json::{LFS_POINTER, Object, is_lfs_pointer, show};

/// A file begins with the length of its header.
const LENGTH_BYTES: usize = size_of::<u64>();

/// The tensors of one or several safetensors files, taken out one by one by name.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// What messages name where a tensor is in no file.
    path: PathBuf,
    files: Vec<(PathBuf, Arc<Storage>)>,
    tensors: HashMap<String, Stored>,
}

/// Where a tensor is and what its file says of it.
#[derive(Debug)]
struct Stored {
    file: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Checkpoint {
    /// Maps the model of a Hugging Face directory: `model.safetensors`, or shards with an index.
    pub(crate) fn open_model(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        if single.exists() {
            return Self::open_file(&single);
        }
        let index_path = dir.join("model.safetensors.index.json");
        match Object::read(&index_path)? {
            Some(index) => Self::open_shards(dir, &index),
            None => {
                let reason = if dir.join("pytorch_model.bin").exists()
                    || dir.join("pytorch_model.bin.index.json").exists()
                {
                    "has pytorch_model.bin, which can't be read: convert it to model.safetensors"
                } else {
                    "has neither model.safetensors nor model.safetensors.index.json"
                };
                Err(Error::Weights { path: dir.to_owned(), reason: reason.to_owned() })
            }
        }
    }

    /// Maps one file.
    pub(crate) fn open_file(path: &Path) -> Result<Self> {
        let mut checkpoint = Self::empty(path);
        checkpoint.add_file(path, map(path)?)?;
        Ok(checkpoint)
    }

    /// Reads a file that is in the binary; `path` is for messages.
    pub(crate) fn from_static(path: &Path, bytes: &'static [u8]) -> Result<Self> {
        let mut checkpoint = Self::empty(path);
        checkpoint.add_file(path, Storage::Static(bytes))?;
        Ok(checkpoint)
    }

    fn empty(path: &Path) -> Self {
        Self { path: path.to_owned(), files: Vec::new(), tensors: HashMap::new() }
    }

    fn open_shards(dir: &Path, index: &Object) -> Result<Self> {
        let Some(weight_map) = index.object("weight_map")? else {
            return Err(index.invalid("weight_map", "an object", "nothing"));
        };
        let mut files: Vec<&str> = Vec::new();
        for (tensor, file) in weight_map.fields() {
            // A name with a separator could lead out of the directory.
            match file.as_str().filter(|file| Path::new(file).file_name().is_some_and(|name| name == *file)) {
                Some(file) => files.push(file),
                None => {
                    return Err(weight_map.invalid(
                        tensor,
                        "the name of a file in this directory",
                        show(file),
                    ));
                }
            }
        }
        files.sort_unstable();
        files.dedup();
        let mut checkpoint = Self::empty(dir);
        for file in files {
            let path = dir.join(file);
            checkpoint.add_file(&path, map(&path)?)?;
        }
        for (tensor, file) in weight_map.fields() {
            let holder = checkpoint.tensors.get(tensor).map(|stored| checkpoint.file_name(stored.file));
            if holder.as_deref() != file.as_str() {
                let found = holder.map_or_else(|| "nothing".to_owned(), |holder| format!("it in {holder}"));
                return Err(Error::Tensor {
                    path: index.path().to_owned(),
                    tensor: tensor.clone(),
                    expected: format!("it in {}", show(file)),
                    found,
                });
            }
        }
        Ok(checkpoint)
    }

    fn file_name(&self, file: usize) -> String {
        let name = self.files.get(file).and_then(|(path, _)| path.file_name());
        name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// Reads the header of a file and notes its tensors.
    fn add_file(&mut self, path: &Path, storage: Storage) -> Result<()> {
        let malformed = |reason: String| Error::Weights { path: path.to_owned(), reason };
        let bytes = storage.bytes();
        if is_lfs_pointer(bytes) {
            return Err(malformed(LFS_POINTER.to_owned()));
        }
        let (header_len, metadata) = SafeTensors::read_metadata(bytes)
            .map_err(|error| malformed(format!("damaged or cut off: {error}")))?;
        let data = bytes.get(LENGTH_BYTES + header_len..).unwrap_or_default();
        let file = self.files.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            // The crate adds the sizes that a header claims without looking for an overflow.
            if start > end || end > data.len() {
                let reason =
                    format!("tensor `{name}` ends at byte {end} of {}: the file is cut off", data.len());
                return Err(malformed(reason));
            }
            let data_start = LENGTH_BYTES + header_len;
            let bytes = data_start + start..data_start + end;
            match self.tensors.entry(name) {
                Entry::Vacant(entry) => {
                    entry.insert(Stored { file, dtype: info.dtype, shape: info.shape.clone(), bytes });
                }
                Entry::Occupied(entry) => {
                    return Err(malformed(format!("tensor `{}` is in two files", entry.key())));
                }
            }
        }
        self.files.push((path.to_owned(), Arc::new(storage)));
        Ok(())
    }

    /// Whether there is a tensor of this name.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Takes the tensor `name`, which must have `shape`.
    pub(crate) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let expected = || format!("shape {shape:?}");
        let Some(stored) = self.tensors.get(name) else {
            return Err(self.tensor_error(name, &expected(), "nothing"));
        };
        if stored.shape != shape {
            return Err(self.tensor_error(name, &expected(), &format!("shape {:?}", stored.shape)));
        }
        let dtype = match stored.dtype {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            other => return Err(self.tensor_error(name, "dtype F32, F16 or BF16", &other.to_string())),
        };
        let tensor = match self.files.get(stored.file) {
            Some((_, storage)) => Tensor::new(storage, stored.bytes.clone(), dtype, shape.to_vec()),
            None => Err("no file".to_owned()),
        };
        let tensor =
            tensor.map_err(|found| self.tensor_error(name, "as many bytes as its shape says", &found))?;
        self.tensors.remove(name);
        Ok(tensor)
    }

    /// Refuses what nobody took and `harmless` doesn't know: weights that the model would be computed without.
    pub(crate) fn refuse_rest(&self, harmless: impl Fn(&str) -> bool) -> Result<()> {
        match self.tensors.keys().filter(|name| !harmless(name)).min() {
            Some(name) => {
                Err(self.tensor_error(name, "no such tensor in a Llama of this configuration", "one"))
            }
            None => Ok(()),
        }
    }

    /// The error for tensor `name`; names its file where it is in one.
    pub(crate) fn tensor_error(&self, name: &str, expected: &str, found: &str) -> Error {
        let file = self.tensors.get(name).and_then(|stored| self.files.get(stored.file));
        Error::Tensor {
            path: file.map_or(&self.path, |(path, _)| path).clone(),
            tensor: name.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }
}

fn map(path: &Path) -> Result<Storage> {
    let io = |error| Error::io(path, error);
    // Asked of the path, before it is opened: opening a pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(io(std::io::Error::other("not a regular file")));
    }
    let file = File::open(path).map_err(io)?;
    // SAFETY: a mapping is only sound while nobody changes the file. That is asked of the caller in
    // `LlamaWeights::load`; it is the price of not reading gigabytes into memory, and what every engine that maps
    // its weights pays. The mapping is read-only and private to this process.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Storage::Mapped(map))
}
