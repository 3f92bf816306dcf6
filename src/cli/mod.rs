//! The commands of `lunplug`, one file each. Results go to stdout, progress and errors to stderr.

mod add;
mod batch;
mod chap;
mod client;
mod describe;
mod discover;
mod disk;
mod doctor;
mod expand;
mod failure;
mod file;
mod foreign;
mod hook;
mod iolimits;
mod journal;
mod list;
mod moves;
mod node;
mod output;
mod place;
mod remove;
mod sync;
mod vm;
mod wait;
mod watch;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Parser, Subcommand};

pub use client::Client;
pub use failure::{Exit, Failure};
pub use output::Format;

use crate::types::VmId;

const EXIT_CODES: &str = "\
Exit codes:
  0  done, or found done
  1  failed: damaged data, or a bug
  2  the request is wrong (usage, names, values)
  3  no such VM or volume
  4  it clashes with what exists
  5  somebody has to act first (VM not running, disk in use by the guest, login refused, ...)
  6  not now, or not within --timeout; lunplugd goes on with it
  7  not allowed
  8  called off
  9  journal verify or doctor found problems
Of several volumes, the first that did not come about decides.
docs/errors.md explains every reason.";

/// Hot-plugs SAN volumes into running KVM virtual machines, by the lunplugd of this node.
#[derive(Debug, Parser)]
#[command(name = "lunplug", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// lunplugd's socket.
    #[arg(
        long,
        global = true,
        env = "LUNPLUG_SOCKET",
        value_name = "PATH",
        default_value = "/run/lunplug/lunplugd.sock"
    )]
    socket: PathBuf,
    /// How to print results.
    #[arg(
        short,
        long,
        global = true,
        env = "LUNPLUG_OUTPUT",
        value_enum,
        default_value_t = Format::Table
    )]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Plug a volume into a VM.
    #[command(after_help = EXIT_CODES)]
    Addvolume(Box<add::Args>),
    /// Take volumes from a VM.
    #[command(after_help = EXIT_CODES)]
    Removevolume(remove::Args),
    /// Have a VM's volumes be those of a file: add what is missing, remove what is not in it.
    #[command(after_help = EXIT_CODES)]
    Sync(sync::Args),
    /// Have a volume follow its LUN, which has grown at the array, and tell the guest.
    #[command(after_help = EXIT_CODES)]
    Expand(expand::Args),
    /// Set how much I/O a guest may do on a volume, also while it uses it. What is not given is not limited.
    #[command(after_help = EXIT_CODES)]
    Iolimits(iolimits::Args),
    /// List volumes.
    List(list::Args),
    /// Show everything about one volume.
    Describe(describe::Args),
    /// Register, list and unregister VMs.
    #[command(subcommand)]
    Vm(vm::Command),
    /// Make a VM's volumes ready for its start: disks of its definition, too, are there before QEMU is.
    #[command(after_help = EXIT_CODES)]
    Preparestart(moves::Start),
    /// What libvirt's qemu hook runs on a plain host: makes a VM's volumes ready when libvirt starts it.
    #[command(after_help = EXIT_CODES)]
    LibvirtHook(hook::Args),
    /// Follow a VM's live migration, to or from another node or between two pods of this one.
    #[command(subcommand, after_help = EXIT_CODES)]
    Migration(moves::Migration),
    /// Show the targets that an iSCSI portal lists to this node. Leaves no record behind.
    Discover(discover::Args),
    /// Show the node.
    Node,
    /// Follow the changes of volumes.
    Watch(watch::Args),
    /// Look for what on this node would hurt volumes: as root, also while lunplugd is down.
    #[command(after_help = EXIT_CODES)]
    Doctor(doctor::Args),
    /// Look at what is stored, without lunplugd: as root, beside it or while it is down.
    #[command(subcommand)]
    Journal(journal::Command),
}

/// Names a VM.
#[derive(Debug, clap::Args)]
struct VmArg {
    /// The VM: NAME, or NAMESPACE/NAME.
    #[arg(value_name = "VM")]
    vm: String,
    #[command(flatten)]
    namespace: Namespace,
}

/// The namespace of a VM.
#[derive(Debug, clap::Args)]
struct Namespace {
    /// The VM's namespace [default: default].
    #[arg(short, long, env = "LUNPLUG_NAMESPACE")]
    namespace: Option<String>,
}

impl Namespace {
    /// The VM of that name; one that is written NAMESPACE/NAME has its namespace with it.
    fn vm(&self, text: &str) -> Result<VmId, Failure> {
        let vm = match (&self.namespace, text.contains('/')) {
            (Some(namespace), false) => VmId::new(namespace, text),
            _ => text.parse(),
        };
        vm.map_err(|error| Failure::malformed("vm", &error))
    }
}

impl VmArg {
    fn id(&self) -> Result<VmId, Failure> {
        self.namespace.vm(&self.vm)
    }
}

/// Where a command writes.
pub struct Screen<'a> {
    /// Results.
    pub out: &'a mut (dyn Write + Send),
    /// Progress and errors.
    pub err: &'a mut (dyn Write + Send),
    /// A person watches: progress moves (on the process's own stderr).
    pub live: bool,
}

/// Runs one command and writes its error, if it has one.
pub async fn run(cli: Cli, screen: &mut Screen<'_>) -> Exit {
    let format = cli.output;
    match dispatch(cli, screen).await {
        Ok(()) => Exit::Ok,
        Err(failure) => {
            // Nowhere is left to complain to.
            let _ = failure.write(format, screen.err);
            failure.exit
        }
    }
}

async fn dispatch(cli: Cli, screen: &mut Screen<'_>) -> Result<(), Failure> {
    let format = cli.output;
    let socket = cli.socket;
    match cli.command {
        Command::Addvolume(args) => add::run(*args, &socket, format, screen).await,
        Command::Removevolume(args) => remove::run(args, &socket, format, screen).await,
        Command::Sync(args) => sync::run(args, &socket, format, screen).await,
        Command::Expand(args) => expand::run(args, &socket, format, screen).await,
        Command::Iolimits(args) => iolimits::run(args, &socket, format, screen).await,
        Command::List(args) => list::run(args, &socket, format, screen).await,
        Command::Describe(args) => describe::run(args, &socket, format, screen).await,
        Command::Vm(command) => vm::run(command, &socket, format, screen).await,
        Command::Preparestart(args) => moves::start(args, &socket, format, screen).await,
        Command::LibvirtHook(args) => hook::run(args, &socket, screen).await,
        Command::Migration(command) => moves::migration(command, &socket, format, screen).await,
        Command::Discover(args) => discover::run(args, &socket, format, screen).await,
        Command::Node => node::run(&socket, format, screen).await,
        Command::Watch(args) => watch::run(args, &socket, format, screen).await,
        Command::Doctor(args) => doctor::run(args, format, screen).await,
        Command::Journal(command) => journal::run(command, format, screen).await,
    }
}

impl From<io::Error> for Failure {
    /// Writing the result failed, e.g. into a closed pipe.
    fn from(error: io::Error) -> Self {
        Failure::plain(Exit::Failed, format!("cannot write the result: {error}"))
    }
}
