//! lunplugd: hot-plugs volumes into the VMs of one node, or, with `--vm`, into one VM.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use lunplug::config::{self, Layers, Loaded};
use lunplug::daemon::{self, Form};
use lunplug::host::priority;
use lunplug::types::VmId;
use lunplug::{host, telemetry, uninstall};
use mimalloc::MiMalloc;

/// glibc's is slow in a heap of thousands of volumes, and keeps twice its size from the system (docs/performance.md).
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// EX_CONFIG of sysexits.h: systemd is told not to restart on it.
const EXIT_CONFIG: u8 = 78;

/// Hot-plugs SAN volumes into the running KVM virtual machines of this node.
///
/// Every key of the configuration can be given in the file, in the environment (LUNPLUG_ and the
/// key in capitals, e.g. LUNPLUG_LOG_LEVEL) and by --set; flags win over the environment, which
/// wins over the file. Exit codes: 0 stopped as told, 1 failed, 2 usage, 78 configuration.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The configuration's file [default: /etc/lunplug/lunplugd.toml, if there].
    #[arg(long, env = "LUNPLUG_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the configuration that is in force, and exit.
    #[arg(long)]
    check_config: bool,
    /// Serve this VM only: the sidecar's form.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    vm: Option<VmId>,
    /// Run on a simulated host: the whole API without SAN, VMs or root.
    #[arg(long)]
    sim: bool,
    /// Faults for the simulated host: a list in YAML or JSON.
    #[arg(long, value_name = "FILE", requires = "sim")]
    sim_faults: Option<PathBuf>,
    /// Take lunplug's device program off this host, and exit; stop lunplugd before. Refused while
    /// containers have devices by it.
    #[arg(long, conflicts_with_all = ["vm", "sim", "check_config"])]
    uninstall: bool,
    /// With --uninstall: even while containers have devices by it.
    #[arg(long, requires = "uninstall")]
    force: bool,
    /// The API's socket.
    #[arg(long, value_name = "PATH")]
    socket: Option<String>,
    /// Directory of durable state.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<String>,
    /// Directory of this boot's state.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<String>,
    /// kubelet's directory.
    #[arg(long, value_name = "DIR")]
    kubelet_root: Option<String>,
    /// This node's name.
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// A level, or directives as info,lunplug::connector=debug.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// auto, text, json or journald.
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Any key of the configuration, e.g. deadlines.attach=1m; can be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(key, value)| (key.trim().into(), value.trim().into()))
        .ok_or_else(|| "write it as KEY=VALUE, e.g. log.level=debug".into())
}

impl Args {
    /// The flags as the configuration's uppermost layer; --set comes first, so that it never
    /// overrides a flag of that name.
    fn layer(&mut self) -> Vec<(String, String, String)> {
        let set = std::mem::take(&mut self.set).into_iter().map(|(k, v)| ("--set", k, v));
        let flags = [
            ("--socket", "socket", self.socket.take()),
            ("--state-dir", "state_dir", self.state_dir.take()),
            ("--run-dir", "run_dir", self.run_dir.take()),
            ("--kubelet-root", "kubelet_root", self.kubelet_root.take()),
            ("--node-name", "node_name", self.node_name.take()),
            ("--log-level", "log.level", self.log_level.take()),
            ("--log-format", "log.format", self.log_format.take()),
        ];
        let flags = flags.into_iter().filter_map(|(f, k, v)| Some((f, k.to_owned(), v?)));
        set.chain(flags).map(|(f, k, v)| (f.to_owned(), k, v)).collect()
    }

    fn load(&mut self) -> Result<Loaded, config::Error> {
        let flags = self.layer();
        let mut loaded = Layers::from_system(self.config.as_deref(), flags)?.load()?;
        loaded.config.resolve(self.vm.as_ref(), &host::facts::hostname());
        Ok(loaded)
    }
}

fn main() -> ExitCode {
    let mut args = Args::parse();
    let loaded = match args.load() {
        Ok(loaded) => loaded,
        Err(error) => return fail(&error, EXIT_CONFIG),
    };
    if args.check_config {
        return print_config(&loaded);
    }
    if let Err(error) = telemetry::init(&loaded.config.log) {
        return fail(&error, EXIT_CONFIG);
    }
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let uninstall = args.uninstall.then_some(args.force);
    let form = Form { only_vm: args.vm, simulated: args.sim, faults: args.sim_faults };
    priority::raise();
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    let runtime = match threads.enable_all().on_thread_start(priority::raise).build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    if let Some(force) = uninstall {
        return match runtime.block_on(uninstall::run(force)) {
            Ok(outcome) => {
                let done = if outcome.changed() { "taken off" } else { "not there" };
                println!("lunplug's device program: {done}");
                ExitCode::SUCCESS
            }
            Err(error) => fail(&error, 1),
        };
    }
    let ended = runtime.block_on(daemon::run(loaded.config, form));
    // A call that is stuck in the kernel must not hold up the end.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

fn print_config(loaded: &Loaded) -> ExitCode {
    for warning in &loaded.warnings {
        eprintln!("lunplugd: warning: {warning}");
    }
    match toml::to_string(&loaded.config) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error, EXIT_CONFIG),
    }
}

/// The error and what caused it, one line for each line of it.
fn fail(error: &dyn Error, code: u8) -> ExitCode {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    for line in text.lines() {
        eprintln!("lunplugd: {line}");
    }
    ExitCode::from(code)
}
