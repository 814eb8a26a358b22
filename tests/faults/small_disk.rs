//! A file system that is really full.

use super::common::{fresh_dir, rng};
use super::newest;
use super::toy::{Setup, Toy, straight};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use tch_peft::{Error, Run};

/// A tmpfs of 512 KiB; unmounted when dropped.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    /// None where this isn't allowed.
    fn mount(dir: &'a Path) -> Option<Self> {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", "size=512k", "tmpfs"]).arg(dir);
        command.output().is_ok_and(|output| output.status.success()).then_some(Small(dir))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint_and_a_run_that_goes_on() {
    let _rng = rng();
    let dir = fresh_dir("faults-small-disk");
    let expected = straight(Setup::default(), &fresh_dir("faults-small-disk-straight"), 6);
    let Some(_mounted) = Small::mount(&dir) else {
        eprintln!("no tmpfs can be mounted here: this test checks nothing");
        return;
    };
    for background in [false, true] {
        let folder = dir.join(format!("run-{background}"));
        let mut toy = Toy::new(Setup::default(), Run::builder(&folder).every(1).keep(1).background(background));
        toy.start().unwrap();
        toy.train_to(2);
        assert_eq!(newest(&folder), 2);

        // Fill it, but for one page.
        let ballast = dir.join("ballast");
        let mut file = fs::File::create(&ballast).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
        for step in [3, 4] {
            let error = toy.step().and_then(|_| toy.run.flush()).unwrap_err();
            let Error::NotSaved { step: failed, source } = &error else { panic!("{error}") };
            assert_eq!(*failed, step);
            let Error::Io { source, .. } = source.as_ref() else { panic!("{error}") };
            assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{error}");
            assert_eq!(newest(&folder), 2);
        }

        // With room again, the next is saved.
        fs::remove_file(&ballast).unwrap();
        toy.train_to(5);
        assert_eq!(newest(&folder), 5);
        drop(toy);
        let mut toy = Toy::new(Setup::default(), Run::builder(&folder));
        toy.start().unwrap();
        assert_eq!(toy.run.current_step(), 5);
        toy.train_to(6);
        assert_eq!(toy.adapter(), expected);
        drop(toy);
        fs::remove_dir_all(&folder).unwrap();
    }
}
