//! The simulated pods: directories, processes, cgroups and grants.
