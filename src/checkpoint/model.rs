//! What a checkpoint needs of a [`LoraModel`].

use super::layout::{ADAPTER, ADAPTER_CONFIG};
use super::{CheckpointFiles, Checkpointable, Content};
use crate::base::Fingerprint;
use crate::error::{Error, Result};
use crate::format::peft;
use crate::model::LoraModel;
use tch::Device;

impl<M> Checkpointable for LoraModel<M> {
    fn adapter_files(&self) -> Result<Vec<(String, Content)>> {
        let (tensors, config) = self.adapter_contents()?;
        Ok(vec![(ADAPTER.into(), Content::Tensors(tensors)), (ADAPTER_CONFIG.into(), Content::Bytes(config))])
    }

    fn check_adapter(&self, files: &CheckpointFiles) -> Result<()> {
        let recorded = peft::config_from_json(&files.path(ADAPTER_CONFIG), files.get(ADAPTER_CONFIG)?)?.config;
        let differences = recorded.differences(self.config());
        if !differences.is_empty() {
            return Err(Error::DifferentConfig { what: "LoRA configuration".into(), differences });
        }
        self.check_tensors(&files.path(ADAPTER), &files.tensors(ADAPTER)?)
    }

    fn load_adapter(&mut self, files: &CheckpointFiles) -> Result<()> {
        self.load_tensors(&files.path(ADAPTER), files.tensors(ADAPTER)?)
    }

    fn fingerprint(&self) -> Result<Fingerprint> {
        self.base().fingerprint()
    }

    fn devices(&self) -> Vec<Device> {
        let mut devices = vec![Device::Cpu];
        for parameter in self.parameters() {
            let device = parameter.tensor.device();
            if !devices.contains(&device) {
                devices.push(device);
            }
        }
        devices
    }
}
