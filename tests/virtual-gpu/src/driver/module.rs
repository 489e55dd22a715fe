//! Modules.

use super::*;
use crate::device::Function;
use crate::memory::State;
use crate::profile::{Profile, SHARED_DEFAULT};
use crate::program::{GlobalVariable, Kernel, Module};
use crate::ptx::ast::{self, Space};
use crate::ptx::parser::parse;
use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, c_char, c_int, c_uint};

/// The driver that is imitated: CUDA 12.8, PTX 8.7.
pub const DRIVER_VERSION: c_int = 12_080;
/// The environment variable with another version to report, so that programs can be seen refusing an old driver.
pub const DRIVER_VERSION_VARIABLE: &str = "VCUDA_DRIVER_VERSION";
/// Under this name a device counts the mutations that found their place.
pub(super) const MUTATION: &str = "mutation";
const PTX_VERSION: (u32, u32) = (8, 7);

fn fits(profile: Profile, version: (u32, u32), target: u32) -> Result<(), (Code, String)> {
    if version > PTX_VERSION {
        let (major, minor) = version;
        let message =
            format!("PTX {major}.{minor} is newer than this driver's {}.{}", PTX_VERSION.0, PTX_VERSION.1);
        return Err((code::UNSUPPORTED_PTX_VERSION, message));
    }
    let (major, minor) = profile.capability;
    if target > major * 10 + minor {
        let message = format!("the image is for sm_{target}, the device is sm_{major}{minor}");
        return Err((code::NO_BINARY_FOR_GPU, message));
    }
    Ok(())
}

/// An image that was decoded, and whose kernels do not depend on where its variables are placed.
struct Decoded {
    text: String,
    version: (u32, u32),
    target: u32,
    variables: Vec<ast::Variable>,
    kernels: Vec<Arc<Kernel>>,
}

/// The images decoded last, the latest first: a test loads the same few many times.
static DECODED: Mutex<VecDeque<Arc<Decoded>>> = Mutex::new(VecDeque::new());
/// How many are kept.
const KEPT: usize = 32;

fn decoded(text: &str) -> Option<Arc<Decoded>> {
    let mut all = DECODED.lock().unwrap_or_else(PoisonError::into_inner);
    let at = all.iter().position(|image| image.text == text)?;
    let found = all.remove(at)?;
    all.push_front(Arc::clone(&found));
    Some(found)
}

fn keep(image: Decoded) {
    let mut all = DECODED.lock().unwrap_or_else(PoisonError::into_inner);
    all.push_front(Arc::new(image));
    all.truncate(KEPT);
}

/// Places the variables of a module in device memory.
fn place(d: &mut Device, variables: &[ast::Variable]) -> Result<Vec<GlobalVariable>, (Code, String)> {
    let mut out = Vec::new();
    for v in variables.iter().filter(|v| matches!(v.space, Space::Global | Space::Const)) {
        let size = v.size.max(1);
        let full = || (code::OUT_OF_MEMORY, format!("no memory for `{}`", v.name));
        let address = d.memory.allocate(size as u64, State::Live).ok_or_else(full)?;
        let mut bytes = v.init.clone();
        bytes.resize(size, 0);
        if let Some(allocation) = d.memory.at(address) {
            allocation.write(0, &bytes);
        }
        out.push(GlobalVariable { name: v.name.clone(), address, size: v.size });
    }
    Ok(out)
}

fn release(d: &mut Device, globals: &[GlobalVariable]) {
    for variable in globals {
        d.memory.free(variable.address);
    }
}

fn load_text(d: &mut Device, text: &str) -> Result<u64, (Code, String)> {
    let captured = |code| (code, "an image is loaded while a stream is captured".to_string());
    super::memory::invalidate_captures(d).map_err(captured)?;
    let mut text = Cow::Borrowed(text);
    for mutation in d.mutations.clone() {
        if let Some(changed) = mutation.apply(&text) {
            text = Cow::Owned(changed);
            *d.calls.entry(MUTATION).or_default() += 1;
        }
    }
    if let Some(image) = decoded(&text) {
        fits(d.profile, image.version, image.target)?;
        let globals = place(d, &image.variables)?;
        return Ok(add(d, &image.kernels, globals));
    }
    let parsed = parse(&text).map_err(|e| (code::INVALID_PTX, e.to_string()))?;
    let (version, target) = (parsed.version, parsed.target);
    fits(d.profile, version, target)?;
    let globals = place(d, &parsed.variables)?;
    let addresses: HashMap<String, u64> = globals.iter().map(|g| (g.name.clone(), g.address)).collect();
    let kernels: Vec<Arc<Kernel>> = match crate::decode::decode(&parsed, &addresses) {
        Ok(kernels) => kernels.into_iter().map(Arc::new).collect(),
        Err(error) => {
            release(d, &globals);
            return Err((code::INVALID_PTX, error.to_string()));
        }
    };
    if !kernels.iter().any(|kernel| kernel.placed) {
        let (text, variables, kernels) = (text.into_owned(), parsed.variables, kernels.clone());
        keep(Decoded { text, version, target, variables, kernels });
    }
    Ok(add(d, &kernels, globals))
}

fn add(d: &mut Device, kernels: &[Arc<Kernel>], globals: Vec<GlobalVariable>) -> u64 {
    let kernels = kernels.iter().map(|k| (k.name.clone(), Arc::clone(k))).collect();
    let id = d.fresh_id();
    d.modules.insert(id, Module { kernels, globals });
    id
}

/// Loads an image: PTX text, ended by a zero.
unsafe fn load(image: *const c_char, name: &'static str) -> Result<Handle, (Code, String)> {
    let plain = |code| (code, String::new());
    let ordinal = current().map_err(plain)?;
    if image.is_null() {
        return Err(plain(code::INVALID_VALUE));
    }
    // SAFETY: the caller's promise; every image has at least four bytes before its end.
    let magic = unsafe { CStr::from_ptr(image) }.to_bytes();
    if magic.starts_with(b"\x7fELF") || magic.starts_with(&[0x50, 0xed, 0x55, 0xba]) {
        let message = "the virtual device interprets PTX; it cannot run cubins or fatbins".to_string();
        return Err((code::NO_BINARY_FOR_GPU, message));
    }
    let text = String::from_utf8_lossy(magic);
    let mut outcome = Err(plain(code::UNKNOWN));
    perform(ordinal, name, Call::Module, |d| {
        outcome = load_text(d, &text).map(|id| handle(ordinal, Kind::Module, id));
        Ok(())
    })
    .map_err(plain)?;
    outcome
}

unsafe fn load_and_explain(to: *mut Handle, image: *const c_char, name: &'static str) -> Result<(), Code> {
    // SAFETY: the caller's promise.
    match unsafe { load(image, name) } {
        Ok(module) => unsafe { give(to, module) },
        Err((code, text)) => {
            errors::remember(&text);
            Err(code)
        }
    }
}

const ERROR_LOG: c_int = 5;
const ERROR_LOG_SIZE: c_int = 6;

entry! {
    fn cuModuleLoadData(module: *mut Handle, image: *const c_char) {
        load_and_explain(module, image, "cuModuleLoadData")
    }

    fn cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const c_char,
        count: c_uint,
        options: *const c_int,
        values: *const Handle,
    ) {
        let (mut log, mut size) = (std::ptr::null_mut::<u8>(), 0usize);
        for n in 0..count as usize {
            match *options.add(n) {
                ERROR_LOG => log = (*values.add(n)).cast(),
                ERROR_LOG_SIZE => size = *values.add(n) as usize,
                _ => {}
            }
        }
        match load(image, "cuModuleLoadDataEx") {
            Ok(found) => give(module, found),
            Err((code, text)) => {
                if !log.is_null() && size > 0 {
                    let kept = text.len().min(size - 1);
                    std::ptr::copy_nonoverlapping(text.as_ptr(), log, kept);
                    log.add(kept).write(0);
                }
                errors::remember(&text);
                Err(code)
            }
        }
    }

    fn cuModuleLoad(module: *mut Handle, path: *const c_char) {
        let path = CStr::from_ptr(path).to_string_lossy();
        let Ok(mut bytes) = std::fs::read(path.as_ref()) else { return Err(code::FILE_NOT_FOUND) };
        bytes.push(0);
        load_and_explain(module, bytes.as_ptr().cast(), "cuModuleLoad")
    }

    fn cuModuleUnload(module: Handle) {
        let (ordinal, id) = open(module, Kind::Module)?;
        perform(ordinal, "cuModuleUnload", Call::Query, |d| {
            let _ = d.drain_all();
            let module = d.modules.remove(&id).ok_or(code::INVALID_HANDLE)?;
            release(d, &module.globals);
            d.functions.retain(|_, f| f.module != id);
            Ok(())
        })
    }

    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) {
        let (ordinal, id) = open(module, Kind::Module)?;
        let name = CStr::from_ptr(name).to_string_lossy();
        let found = perform(ordinal, "cuModuleGetFunction", Call::Module, |d| {
            let module = d.modules.get(&id).ok_or(code::INVALID_HANDLE)?;
            let kernel = Arc::clone(module.kernels.get(name.as_ref()).ok_or(code::NOT_FOUND)?);
            let known = d.functions.iter().find(|(_, f)| f.module == id && Arc::ptr_eq(&f.kernel, &kernel));
            if let Some((&known, _)) = known {
                return Ok(known);
            }
            let number = d.fresh_id();
            let max_dynamic_shared = SHARED_DEFAULT.saturating_sub(kernel.shared_bytes as u32);
            d.functions.insert(number, Function { kernel, module: id, max_dynamic_shared });
            Ok(number)
        })?;
        give(function, handle(ordinal, Kind::Function, found))
    }

    fn cuModuleGetGlobal_v2(address: *mut u64, size: *mut usize, module: Handle, name: *const c_char) {
        let (ordinal, id) = open(module, Kind::Module)?;
        let name = CStr::from_ptr(name).to_string_lossy();
        let found = perform(ordinal, "cuModuleGetGlobal_v2", Call::Module, |d| {
            let module = d.modules.get(&id).ok_or(code::INVALID_HANDLE)?;
            let variable = module.globals.iter().find(|g| g.name == name);
            variable.map(|g| (g.address, g.size)).ok_or(code::NOT_FOUND)
        })?;
        if !address.is_null() {
            address.write(found.0);
        }
        if !size.is_null() {
            size.write(found.1);
        }
        Ok(())
    }
}
