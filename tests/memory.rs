//! Memory of the process; one test alone in its binary, since others would be
//! counted too.

mod common;

use std::fs;
use tch::{Device, nn};
use tch_peft::{Base, Fp8Format, QuantConfig};

const LAYERS: usize = 8;
/// One dense weight of 4096 x 2048, in MB.
const DENSE: f64 = 4096.0 * 2048.0 * 4.0 / 1e6;

/// A value of `/proc/self/status`, in MB.
fn status(field: &str) -> f64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 1024.0 / 1e6
}

#[test]
fn quantising_frees_each_dense_weight_as_it_goes() {
    let mut idle = Vec::new();
    for scheme in ["int8", "nf4", "nf4+dq", "int4", "fp8", "int8"] {
        idle.push(status("VmRSS"));
        let vs = nn::VarStore::new(Device::Cpu);
        let layers: Vec<_> =
            (0..LAYERS).map(|i| nn::linear(vs.root() / "h" / i, 2048, 4096, Default::default())).collect();
        let base = Base::new(vs, layers);
        let config = match scheme {
            "int8" => QuantConfig::int8(),
            "int4" => QuantConfig::int4(),
            "fp8" => QuantConfig::fp8(Fp8Format::E4m3),
            _ => QuantConfig::nf4().double_quant(scheme == "nf4+dq"),
        };
        let before = status("VmRSS");
        // Makes the peak start again from here.
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let base = base.quantize(&config.build().unwrap()).unwrap();
        let (peak, after) = (status("VmHWM"), status("VmRSS"));

        let report = base.quantization_report();
        assert_eq!(report.bytes_before() as f64, LAYERS as f64 * DENSE * 1e6);
        let packed = report.bytes_after() as f64 / 1e6;
        assert!(packed < LAYERS as f64 * DENSE / if matches!(scheme, "int8" | "fp8") { 3.9 } else { 7.0 });
        // At no time is there more than the packed form of one weight beside the dense ones.
        assert!(
            peak < before + packed / LAYERS as f64 + DENSE / 8.0,
            "{scheme}: {before:.0} MB at first, {peak:.0} MB at most"
        );
        if scheme == "nf4" {
            loading_holds_little_more_than_the_packed_weights(&base, packed);
        }
        let freed = before - after;
        let expected = LAYERS as f64 * DENSE - packed;
        assert!(freed > 0.9 * expected, "{scheme}: {freed:.0} MB freed of {expected:.0}");
    }
    // The packed weights went with their last handles: five more rounds, of
    // 290 MB in all, left no more than what an allocator keeps.
    let grown = status("VmRSS") - idle[1];
    assert!(grown < 4.0 * DENSE, "{grown:.0} MB more after the last round than after the first");
}

/// Reading a saved base back, its peak is the packed weights and one dense one over what was there.
fn loading_holds_little_more_than_the_packed_weights(base: &Base<Vec<nn::Linear>>, packed: f64) {
    let folder = common::fresh_dir("memory");
    base.save_quantized(&folder).unwrap();
    let vs = nn::VarStore::new(Device::Cpu);
    let layers: Vec<_> = (0..LAYERS).map(|i| nn::linear(vs.root() / "h" / i, 2048, 4096, Default::default())).collect();
    let before = status("VmRSS");
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let loaded = Base::new(vs, layers).load_quantized(&folder).unwrap();
    let (peak, after) = (status("VmHWM"), status("VmRSS"));
    assert_eq!(loaded.quantization_report(), base.quantization_report());
    // The dense weights of the module go one by one, as the packed ones come.
    assert!(peak < before + DENSE / 2.0, "{before:.0} MB at first, {peak:.0} MB at most");
    let freed = before - after;
    let expected = LAYERS as f64 * DENSE - packed;
    assert!(freed > 0.9 * expected, "{freed:.0} MB freed of {expected:.0}");
    fs::remove_dir_all(&folder).unwrap();
}
