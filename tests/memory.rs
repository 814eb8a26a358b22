//! Memory of the process; alone in its binary, since other tests would be
//! counted too.

use tch::{Device, nn};
use tch_peft::{Base, QuantConfig};

#[test]
fn the_dense_storage_is_freed_and_the_site_dies_with_the_last_handle() {
    let resident = || {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse::<f64>().unwrap() * 4096.0 / 1e6
    };
    let vs = nn::VarStore::new(Device::Cpu);
    let module = nn::linear(vs.root() / "up", 8192, 4096, Default::default()); // 134 MB dense
    let base = Base::new(vs, module);
    let before = resident();
    let base = base.quantize(&QuantConfig::nf4().build().unwrap()).unwrap();
    let report = base.quantization_report();
    assert_eq!(report.bytes_before(), 8192 * 4096 * 4);
    assert!((report.bytes_after() as f64) < report.bytes_before() as f64 / 7.0);
    let after = resident();
    assert!(after < before - 100.0, "{before} MB before, {after} MB after");
    drop(base);
    assert!(resident() < after - 15.0, "{after} MB with the packed base, {} MB without", resident());
}
