//! Volumes with multipath.conf as others have it.

use crate::node::{Lab, Lun, Story, add, guest_disk, iqn, remove, sh, until, volume};
use crate::san::SOON;

/// Settings of multipathd's, until they are dropped.
struct Conf;

const FILE: &str = "/etc/multipath/conf.d/story.conf";

impl Conf {
    #[track_caller]
    fn set(find_multipaths: &str, friendly_names: &str, more: &str) -> Self {
        let conf = Self;
        sh(&format!(
            "mkdir -p $(dirname {FILE})
            printf '%s\\n' 'defaults {{' ' find_multipaths {find_multipaths}' \
                ' user_friendly_names {friendly_names}' '}}' '{more}' >{FILE}
            multipathd reconfigure"
        ))
        .ok();
        Self::is_read(find_multipaths);
        conf
    }

    /// multipathd answers `reconfigure` before it has read the files. It writes `yes` as `on`.
    #[track_caller]
    fn is_read(find_multipaths: &str) {
        let setting = format!("find_multipaths \"{find_multipaths}\"");
        until("multipathd has read it", SOON, || {
            sh("multipathd show config local").stdout.contains(&setting)
        });
    }
}

impl Drop for Conf {
    fn drop(&mut self) {
        sh(&format!(
            "rm -f {FILE}; rmdir /etc/multipath/conf.d 2>/dev/null; multipathd reconfigure"
        ));
    }
}

fn map_of(name: &str) -> String {
    volume(name)["device"]["map"].as_str().expect("it has a map").to_owned()
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_map_comes_about_however_multipathd_finds_its_paths_and_names_its_maps() {
    Lab::get();
    let lun = Lun::new("mpc", 1, "16M");
    let story = Story::begin();
    let multipath_wwid = lun.wwid.replace("naa.", "3");
    let alias =
        format!("multipaths {{\n multipath {{\n  wwid {multipath_wwid}\n  alias blue\n }}\n}}");
    for (find_multipaths, friendly_names, more, name) in [
        ("on", "no", "", multipath_wwid.as_str()),
        ("greedy", "yes", alias.as_str(), "blue"),
        ("strict", "yes", "", "mpath"),
    ] {
        let conf = Conf::set(find_multipaths, friendly_names, more);
        add("mpc", &lun.source(), &["--multipath", "required"]).ok();
        assert!(map_of("mpc").starts_with(name), "{find_multipaths}: {}", map_of("mpc"));
        assert_eq!(volume("mpc")["device"]["paths"], 2, "{find_multipaths}");
        assert_eq!(guest_disk("mpc").bytes, 16 << 20);
        remove("mpc", &[]).ok();
        story.nothing_left();
        // Of a LUN that was never seen before, by one path.
        if matches!(find_multipaths, "on" | "strict") {
            let one_portal = format!("iscsi://127.0.0.2/{}/1", iqn());
            add("mpc", &one_portal, &["--multipath", "required"]).ok();
            assert!(map_of("mpc").starts_with(name), "{find_multipaths}: {}", map_of("mpc"));
            remove("mpc", &[]).ok();
            story.nothing_left();
        }
        drop(conf);
        Conf::is_read("off");
    }
}
