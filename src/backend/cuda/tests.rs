//! The device's own calls, and every kernel by itself, on the virtual GPU.

mod attention;
mod bed;
mod embed;
mod fusion;
mod lora;
mod problem;
mod projections;
mod step;

use virtual_gpu::host::{self, Driver};

use super::device::{Gpu, first_usable};

/// A virtual GPU of its own for each test, and the engine's view of it.
pub(super) fn virtual_gpu(profile: &str) -> (host::Gpu, std::sync::Arc<Gpu>) {
    let driver = Driver::load().expect("the virtual driver stands beside the test");
    let device = driver.device(profile).expect("a known profile");
    let gpu = Gpu::open(device.ordinal()).expect("the virtual GPU opens");
    (device, gpu)
}

#[test]
fn a_gpu_says_what_it_is() {
    let (_device, gpu) = virtual_gpu("h100");
    assert_eq!(gpu.compute_capability(), (9, 0));
    assert_eq!(gpu.multiprocessors(), 132);
    assert_eq!(gpu.shared_bytes(), 227 << 10);
    assert_eq!(first_usable(), Ok(Some(0)));
    let (free, total) = gpu.memory().unwrap();
    assert!(free <= total && total > 70 << 30, "{free} of {total}");
}

#[test]
fn a_number_without_a_gpu_is_refused() {
    let _some = virtual_gpu("a100");
    let message = Gpu::open(100_000).unwrap_err().to_string();
    assert!(message.starts_with("device cuda:100000: there "), "{message}");
}

#[test]
fn numbers_come_back_as_they_went() {
    let (device, gpu) = virtual_gpu("rtx4090");
    let stream = gpu.stream().unwrap();
    let mut buffer = gpu.zeros::<f32>(&stream, 5, "a test").unwrap();
    gpu.write(&stream, &mut buffer, 1, &[1.0, 2.0]).unwrap();
    let mut back = [9.0; 4];
    gpu.read(&stream, &buffer, 0, &mut back).unwrap();
    assert_eq!(back, [0.0, 1.0, 2.0, 0.0]);
    let message = gpu.write(&stream, &mut buffer, 4, &[1.0, 2.0]).unwrap_err().to_string();
    assert!(message.ends_with("numbers 4 to 6 of a buffer of 5"), "{message}");
    assert_eq!(device.reports(), []);
}

#[test]
fn more_memory_than_there_is_is_refused_with_numbers() {
    let (_device, gpu) = virtual_gpu("rtx4090");
    let stream = gpu.stream().unwrap();
    let message = gpu.zeros::<u8>(&stream, 30 << 30, "a cache").unwrap_err().to_string();
    assert!(message.contains("a cache needs 30720.0 MiB"), "{message}");
    // A refusal isn't a failure: the GPU goes on.
    gpu.zeros::<u8>(&stream, 1 << 10, "a cache").unwrap();
}

#[test]
fn a_kernel_is_loaded_once_and_by_itself() {
    let (device, gpu) = virtual_gpu("a100");
    let kernels = ["advance", "stamp"].map(|symbol| gpu.kernel("step", symbol).unwrap());
    let loads = || device.calls("cuModuleLoadData");
    assert_eq!(loads(), 0);
    let [advance, stamp] = &kernels;
    let again = gpu.kernel("step", "stamp").unwrap();
    let meanwhile = gpu.load_all(&[stamp, advance, &again, stamp], || Ok(7)).unwrap();
    assert_eq!((meanwhile, loads(), device.calls("cuModuleGetFunction")), (7, 2, 2));
    gpu.load(&again).unwrap();
    assert_eq!(loads(), 2);
    let message = gpu.kernel("step", "halt").unwrap_err().to_string();
    assert_eq!(message, format!("cuda:{}: halt of step: no such kernel is built in", gpu.ordinal()));
}

#[test]
fn a_kernel_that_the_driver_refuses_is_named_with_the_compilers_words() {
    let (device, gpu) = virtual_gpu("a100");
    device.mutate("stamp", "mov.*globaltimer", 0, "no_such_register");
    let kernels = ["advance", "stamp"].map(|symbol| gpu.kernel("step", symbol).unwrap());
    // One thread finds it, and so does whoever comes next.
    let [advance, stamp] = &kernels;
    let message = gpu.load_all(&[advance, stamp], || Ok(())).unwrap_err().to_string();
    assert!(message.contains("cuModuleLoadData of stamp in step: CUDA_ERROR_INVALID_PTX"), "{message}");
    assert!(message.contains("no_such_register"), "{message}");
    let later = gpu.load_all(&[], || gpu.stream().map(drop)).unwrap_err().to_string();
    assert_eq!(later, message);
}
