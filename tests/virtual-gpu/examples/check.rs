//! Tells whether the device would take images: `cargo run --example check -- FILE.ptx …`

use std::collections::HashMap;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in std::env::args().skip(1) {
        let module = virtual_gpu::ptx::parser::parse(&std::fs::read_to_string(&path)?)
            .map_err(|e| format!("{path}: {e}"))?;
        // Any addresses do: nothing runs.
        let globals: HashMap<String, u64> = module
            .variables
            .iter()
            .enumerate()
            .map(|(n, v)| (v.name.clone(), (n as u64 + 1) << 32))
            .collect();
        let kernels = virtual_gpu::decode::decode(&module, &globals).map_err(|e| format!("{path}: {e}"))?;
        println!("{path}: {} kernels", kernels.len());
    }
    Ok(())
}
