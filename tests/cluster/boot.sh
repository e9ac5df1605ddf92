#!/bin/sh
# Process 1 of a host: gives it a name, an /etc and a /run of its own, then answers ssh.
# Arguments: the name, and the folder whose files lie over /etc.
set -eu
name=$1 etc=$2
mount -t overlay -o "lowerdir=$etc:/etc" overlay /etc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm # else MPI and gloo would find each other's segments
mkdir /run/sshd
hostname "$name"
ip link set lo up
exec /usr/sbin/sshd -D -e # it reaps what is orphaned, as process 1 has to
